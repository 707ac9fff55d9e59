//! `[data]` of users, items and ratings.

use super::*;

/// What a job may say of a line's cells; others are passed over.
const CELLS: [&str; 4] = ["user", "item", "rating", "time"];

/// The word that stands for runs of spaces and tabs.
const WHITESPACE: &str = "whitespace";

/// `format = "ratings"`
pub(super) fn files(r: &Reader<'_>, base: &str) -> Result<RatingFiles> {
    let test = r.text("test")?.optional();
    let holdout = |kind: &Kind| match kind {
        Kind::Text(word) if word == "last" => Some(HeldOut::Last),
        other => number(other).filter(|share| (BETWEEN.fits)(*share)).map(HeldOut::Share),
    };
    let holdout = r.get("holdout", "\"last\" or a number above 0 and below 1", holdout)?.optional();
    if test.is_some() && holdout.is_some() {
        return r.refuse("holdout", "and `data.test` are both given; keep one of them");
    }
    let holdout = match holdout {
        Some(HeldOut::Share(share)) => Some(match r.word("holdout_by", "holdout_by", &["user", "item"])?.optional() {
            Some("user") => HeldOut::Users(share),
            Some(_) => HeldOut::Items(share),
            None => HeldOut::Share(share),
        }),
        other => {
            r.only_with(&["holdout_by"], "a number as data.holdout")?;
            other
        }
    };
    let implicit = r.node("implicit").optional().map(implicit).transpose()?;
    let columns = r.list("columns", "a text", text)?.optional();
    if let Some(columns) = &columns {
        let count = |cell: &str| columns.iter().filter(|column| *column == cell).count();
        let rated = implicit.is_none_or(|implicit| implicit.threshold.is_some());
        let needed: &[&str] = if rated { &CELLS[..3] } else { &CELLS[..2] };
        if let Some(cell) = needed.iter().find(|cell| count(cell) == 0) {
            let way_out = "write for example columns = [\"user\", \"item\", \"rating\", \"time\"]";
            return r.refuse("columns", &format!("has no {cell:?}; say which cell of a line is which: {way_out}"));
        }
        if let Some(cell) = CELLS.iter().find(|cell| count(cell) > 1) {
            return r.refuse("columns", &format!("has {cell:?} twice; give it to one cell of a line"));
        }
        if holdout == Some(HeldOut::Last) && count("time") == 0 {
            let way_out = "holdout = \"last\" goes by it: add it, or hold out a share of the lines";
            return r.refuse("columns", &format!("has no \"time\", and {way_out}"));
        }
    }
    let separator = |kind: &Kind| match text(kind)? {
        word if word == WHITESPACE => Some(Separator::Whitespace),
        word => (!word.is_empty() && !word.contains(['"', '\n', '\r'])).then_some(Separator::Text(word)),
    };
    let what = "a text without quotes and line ends, such as \",\", \"\\t\" or \"::\", or \"whitespace\"";
    Ok(RatingFiles {
        base: base.into(),
        train: r.text("train")?.needed("train = \"ratings.csv\"")?,
        test,
        holdout,
        columns,
        header: r.flag("header")?.or(false),
        separator: r.get("separator", what, separator)?.or(Separator::Text(",".into())),
        implicit,
    })
}

/// `task = "ratings"`
pub(super) fn made_up(r: &Reader<'_>, samples: usize, test_samples: usize) -> Result<Ratings> {
    let implicit = r.node("implicit").optional().map(implicit).transpose()?;
    if implicit.is_some_and(|implicit| implicit.threshold.is_some()) {
        return r.refuse("implicit", "has a `threshold`, and what is made up has no ratings then; leave it out");
    }
    let users = r.integer("users", 1..=1 << 40)?.needed("users = 1000")?;
    let test_samples = match implicit {
        // One of each user.
        Some(_) => r.integer("test_samples", COUNT_OR_0)?.or(users) as usize,
        None => test_samples,
    };
    Ok(Ratings {
        users,
        items: r.integer("items", 1..=1 << 40)?.needed("items = 500")?,
        rank: r.integer("rank", 1..=1 << 12)?.or(4) as usize,
        noise: r.f32("noise", &NOT_NEGATIVE)?.or(0.5),
        samples,
        test_samples,
        implicit,
    })
}

fn implicit(node: &Node) -> Result<Implicit> {
    let r = Reader::new(node, "data.implicit")?;
    r.only(&["negatives", "threshold", "eval_negatives", "k"])?;
    let among = |kind: &Kind| match kind {
        Kind::Text(word) if word == "all" => Some(None),
        other => whole(other).filter(|n| (1..=1 << 20).contains(n)).map(|n| Some(n as u32)),
    };
    Ok(Implicit {
        negatives: r.integer("negatives", 1..=1 << 12)?.or(4) as u32,
        threshold: r.f32("threshold", &ANY)?.optional(),
        eval_negatives: r.get("eval_negatives", "\"all\" or a whole number from 1 to 1048576", among)?.or(Some(100)),
        k: r.integer("k", 1..=1 << 20)?.or(10) as u32,
    })
}
