//! What a person writes on the command line: times, rates, and numbers of workers.

use std::str::FromStr;

/// Seconds, as `40ms`, `0.2us`, `30s`, `24h`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Seconds(pub f64);

/// Bytes a second, as `25Gbit`, `800Mbit`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BytesPerSecond(pub f64);

/// How many workers: `8`, `1,2,4`, or `1..64`, which doubles.
#[derive(Clone, Debug, PartialEq)]
pub struct Counts(pub Vec<usize>);

/// A number above 0 and its unit.
fn split<'a>(text: &'a str, wanted: &str) -> Result<(f64, &'a str), String> {
    let text = text.trim();
    let end = text.find(|c: char| c != '.' && !c.is_ascii_digit()).unwrap_or(text.len());
    let number = text[..end].parse::<f64>().ok().filter(|number| *number > 0.0 && number.is_finite());
    let number = number.ok_or_else(|| format!("{text:?} is not {wanted}"))?;
    Ok((number, text[end..].trim()))
}

impl FromStr for Seconds {
    type Err = String;

    fn from_str(text: &str) -> Result<Seconds, String> {
        const WANTED: &str = "a time, as in 40ms; the units are us, ms, s, min and h";
        let (number, unit) = split(text, WANTED)?;
        let unit = match unit {
            "us" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "min" => 60.0,
            "h" => 3600.0,
            _ => return Err(format!("{text:?} is not {WANTED}")),
        };
        Ok(Seconds(number * unit))
    }
}

impl FromStr for BytesPerSecond {
    type Err = String;

    fn from_str(text: &str) -> Result<BytesPerSecond, String> {
        const WANTED: &str = "a link's rate, as in 25Gbit; the units are Kbit, Mbit and Gbit (a second)";
        let (number, unit) = split(text, WANTED)?;
        let unit = match unit.to_ascii_lowercase().as_str() {
            "kbit" => 1e3,
            "mbit" => 1e6,
            "gbit" => 1e9,
            _ => return Err(format!("{text:?} is not {WANTED}")),
        };
        Ok(BytesPerSecond(number * unit / 8.0))
    }
}

/// Workers of one run, at most.
const MOST: usize = 65_536;

impl FromStr for Counts {
    type Err = String;

    fn from_str(text: &str) -> Result<Counts, String> {
        let wanted = || format!("{text:?} is not numbers of workers, as in 1,2,4,8 or 1..64, each from 1 to {MOST}");
        let one = |text: &str| {
            let number = text.trim().parse::<usize>().ok();
            number.filter(|number| (1..=MOST).contains(number)).ok_or_else(wanted)
        };
        let mut counts = match text.split_once("..") {
            Some((from, to)) => {
                let (from, to) = (one(from)?, one(to)?);
                if from > to {
                    return Err(wanted());
                }
                std::iter::successors(Some(from), |n| Some(n * 2)).take_while(|n| *n < to).chain([to]).collect()
            }
            None => text.split(',').map(one).collect::<Result<Vec<_>, _>>()?,
        };
        counts.sort_unstable();
        counts.dedup();
        Ok(Counts(counts))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_understood_or_refused_with_an_example() {
        assert_eq!("0.5ms".parse::<Seconds>().map(|s| s.0), Ok(0.0005));
        assert_eq!("2 h".parse::<Seconds>().map(|s| s.0), Ok(7200.0));
        assert_eq!("25Gbit".parse::<BytesPerSecond>().map(|b| b.0), Ok(3.125e9));
        assert_eq!("1..9".parse::<Counts>().map(|c| c.0), Ok(vec![1, 2, 4, 8, 9]));
        assert_eq!("8, 2,2".parse::<Counts>().map(|c| c.0), Ok(vec![2, 8]));
        assert_eq!("4..4".parse::<Counts>().map(|c| c.0), Ok(vec![4]));
        for wrong in ["40", "ms", "-1ms", "0s", "1e3s", "40 minutes"] {
            assert!(wrong.parse::<Seconds>().is_err_and(|e| e.contains(wrong) && e.contains("40ms")), "{wrong}");
        }
        for wrong in ["25", "25GB", "Gbit", "0Gbit"] {
            assert!(wrong.parse::<BytesPerSecond>().is_err_and(|e| e.contains("25Gbit")), "{wrong}");
        }
        for wrong in ["", "0", "1,,2", "8..1..2", "x", "1..0", "8..1", "100000"] {
            assert!(wrong.parse::<Counts>().is_err_and(|e| e.contains("1,2,4,8")), "{wrong}");
        }
    }
}
