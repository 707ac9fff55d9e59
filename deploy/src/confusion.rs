//! Confusions of classes: a table in a file or on the terminal, and a picture.

use anyhow::{Context, Result, bail};
use ndarray::ArrayView2;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::path::Path;
use unisono_common::data::Prepared;
use unisono_common::metrics::{EvalKind, MOST_CLASSES};

/// More classes than this are no table for a terminal, and no picture.
const MOST_SHOWN: usize = 40;

/// Pixels of a class' row and column in the picture, and of what is around them.
const CELL: u32 = 44;
const MARGIN: u32 = 120;

/// Whether a model has classes that can be counted, and [`write`] a form for them in a file of this name.
///
/// # Errors
/// What the model predicts in their place; what forms there are.
pub fn check(file: &Path, model: &Path, prepared: &Prepared) -> Result<()> {
    let predicts = |what: &str| -> Result<()> {
        bail!("{} predicts {what}, and --confusion is for a model of classes: leave it out", model.display())
    };
    match (EvalKind::of(prepared, None), &prepared.classes) {
        (EvalKind::Regression, _) => predicts("values"),
        (EvalKind::Next { .. }, _) => predicts("the next token of a text"),
        (EvalKind::Ranking { .. }, _) => predicts("how items rank"),
        (kind @ (EvalKind::Binary | EvalKind::Classes { .. }), classes) => {
            let classes = classes.as_ref().map_or(0, Vec::len);
            if kind.counted() == 0 {
                bail!(
                    "{} has {classes} classes, and --confusion counts up to {MOST_CLASSES}: leave it out",
                    model.display()
                )
            }
            check_file(file, classes)
        }
    }
}

fn check_file(path: &Path, classes: usize) -> Result<()> {
    match path.extension().and_then(|ending| ending.to_str()) {
        Some("svg") if classes > MOST_SHOWN => {
            bail!("{classes} classes are too many for a picture, which shows {MOST_SHOWN}: write a .csv")
        }
        Some("csv" | "svg") => Ok(()),
        _ => bail!("{}: confusions are written as a table (.csv) or a picture (.svg)", path.display()),
    }
}

/// Writes how many samples of a class (rows) are taken for a class (columns), as the name of the file says.
pub fn write(path: &Path, classes: &[String], counts: ArrayView2<'_, u64>) -> Result<()> {
    let at = || format!("cannot write {}", path.display());
    if path.extension().is_some_and(|ending| ending == "csv") {
        let mut out = csv::Writer::from_path(path).with_context(at)?;
        out.write_record([&["class".to_string()], classes].concat())?;
        for (class, counts) in classes.iter().zip(counts.rows()) {
            out.write_record(std::iter::once(class.clone()).chain(counts.iter().map(u64::to_string)))?;
        }
        return out.flush().with_context(at);
    }
    let mut picture = String::new();
    draw(&mut picture, classes, counts).map_err(|e| anyhow::anyhow!("cannot draw the confusions: {e}"))?;
    std::fs::write(path, picture).with_context(at)
}

/// The table, where it is not too large for a terminal.
pub fn table(classes: &[String], counts: ArrayView2<'_, u64>) -> Option<String> {
    let short = |name: &String| name.chars().take(12).collect::<String>();
    let names: Vec<String> = classes.iter().map(short).collect();
    let numbers: Vec<String> = counts.iter().map(u64::to_string).collect();
    let width = numbers.iter().chain(&names).map(|text| text.chars().count()).max()?;
    let line = |first: &str, cells: &[String]| {
        let cells: String = cells.iter().map(|cell| format!(" {cell:>width$}")).collect();
        format!("  {first:<13}{cells}\n")
    };
    let lines = names.iter().zip(numbers.chunks(names.len())).map(|(name, cells)| line(name, cells));
    let table = line("is, taken for", &names) + &lines.collect::<String>();
    (classes.len() <= MOST_SHOWN && table.lines().all(|line| line.chars().count() <= 160)).then_some(table)
}

/// A square for each pair, the darker the larger its share of the row.
fn draw(
    picture: &mut String,
    classes: &[String],
    counts: ArrayView2<'_, u64>,
) -> Result<(), Box<dyn std::error::Error>> {
    let side = CELL * classes.len() as u32;
    let root = SVGBackend::with_string(picture, (side + MARGIN + 20, side + MARGIN + 20)).into_drawing_area();
    root.fill(&WHITE)?;
    let font = |size: u32| ("sans-serif", size).into_font();
    let middle = Pos::new(HPos::Center, VPos::Center);
    let of_rows = font(13).color(&BLACK).pos(Pos::new(HPos::Right, VPos::Center));
    let of_columns = font(13).color(&BLACK).pos(middle);
    let short = |name: &String| name.chars().take(14).collect::<String>();
    for (own, (class, counts)) in classes.iter().zip(counts.rows()).enumerate() {
        let (top, all) = ((MARGIN + CELL * own as u32) as i32, counts.sum().max(1) as f64);
        let half = (CELL / 2) as i32;
        root.draw(&Text::new(short(class), ((MARGIN - 8) as i32, top + half), &of_rows))?;
        let across = (MARGIN as i32 + CELL as i32 * own as i32 + half, MARGIN as i32 - 14);
        root.draw(&Text::new(short(class).chars().take(6).collect::<String>(), across, &of_columns))?;
        for (taken, count) in counts.iter().enumerate() {
            let (left, share) = ((MARGIN + CELL * taken as u32) as i32, *count as f64 / all);
            let shade = |light: f64, dark: f64| (light + (dark - light) * share.sqrt()) as u8;
            let fill = RGBColor(shade(245.0, 20.0), shade(248.0, 70.0), shade(252.0, 130.0));
            let corners = [(left, top), (left + CELL as i32 - 1, top + CELL as i32 - 1)];
            root.draw(&Rectangle::new(corners, fill.filled()))?;
            let ink = if share > 0.3 { WHITE } else { BLACK };
            let style = font(if *count < 10_000 { 13 } else { 10 }).color(&ink).pos(middle);
            root.draw(&Text::new(count.to_string(), (left + half, top + half), &style))?;
        }
    }
    let title = font(14).color(&BLACK).pos(middle);
    root.draw(&Text::new("taken for", ((MARGIN + side / 2) as i32, 40), &title))?;
    root.draw(&Text::new("is", (16, (MARGIN + side / 2) as i32), &title))?;
    root.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    #[test]
    fn confusions_are_written_as_their_files_say() {
        let dir = tempfile::tempdir().expect("a folder");
        let (classes, counts) = (["cat", "a dog"].map(String::from), array![[5u64, 12], [0, 31_000]]);
        let path = |name: &str| dir.path().join(name);
        write(&path("c.csv"), &classes, counts.view()).expect("written");
        let text = std::fs::read_to_string(path("c.csv")).expect("text");
        assert_eq!(text, "class,cat,a dog\ncat,5,12\na dog,0,31000\n");
        write(&path("c.svg"), &classes, counts.view()).expect("written");
        let text = std::fs::read_to_string(path("c.svg")).expect("text");
        for word in ["<svg", "a dog", "31000", "taken for"] {
            assert!(text.contains(word), "{word} is not in {text}");
        }
        assert!(check_file(&path("c.png"), 2).is_err() && check_file(&path("c.svg"), 41).is_err());
        assert!(check_file(&path("c.svg"), 40).is_ok() && check_file(&path("c.csv"), 41).is_ok());
        let shown = table(&classes, counts.view()).expect("it is small");
        let widths: Vec<usize> = shown.lines().map(str::len).collect();
        assert!(widths.len() == 3 && widths.iter().all(|width| *width == widths[0]), "{shown}");
        assert!(shown.contains("31000"), "{shown}");
        let many: Vec<String> = (0..50).map(|i| i.to_string()).collect();
        let none = ndarray::Array2::zeros((50, 50));
        assert!(table(&many, none.view()).is_none());
        let message = check_file(&path("m.svg"), 50).unwrap_err().to_string();
        assert!(message.contains("50 classes") && message.contains(".csv"), "{message}");
    }
}
