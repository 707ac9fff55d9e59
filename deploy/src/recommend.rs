//! Which items a user is most likely to take, or to rate highest.

use crate::predict::{Answers, Fields, Predictor, Row, cell};
use crate::trained::Trained;
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use unisono_common::data::{self, DataError, Seen, Targets};
use unisono_common::job::Source;
use unisono_common::rows::NO_ID;

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Top {
    /// Items for each user.
    pub k: usize,
    /// Whether they may be items that the user has in the training set.
    pub with_seen: bool,
}

/// Rows that are computed together.
const ROWS: usize = 4096;

/// Scores all items for a user, and gives the best.
pub struct Recommender<'a> {
    predictor: Predictor<'a>,
    most: usize,
    items: u32,
    /// What is left out.
    seen: Seen,
}

impl<'a> Recommender<'a> {
    /// Reads the training data, where what users have in it is left out.
    ///
    /// # Errors
    /// A model of other data, and training data that is not there or has changed.
    pub fn new(trained: &'a Trained, top: Top) -> Result<Recommender<'a>> {
        if top.k == 0 {
            bail!("--top-k must be at least 1");
        }
        let (manifest, path) = (&trained.manifest, trained.path.display());
        let prepared = &manifest.prepared;
        let of_items = matches!(manifest.job.data.source, Source::Ratings(_) | Source::RatingFiles(_));
        let items = prepared.ids.get(1).and_then(|field| field.size).filter(|_| of_items);
        let items = items.with_context(|| {
            format!("{path} is no model of users and items (format = \"ratings\"), so there are no best items: leave --top-k out")
        })?;
        let items =
            u32::try_from(items).ok().with_context(|| format!("{items} items are too many to score them all"))?;
        let seen = if top.with_seen { Seen::default() } else { seen(trained)? };
        Ok(Recommender { predictor: Predictor::new(trained, ROWS), most: top.k, items, seen })
    }

    /// A user's best items, each with its score.
    fn best(&mut self, user: u64) -> Vec<(f32, u32)> {
        let first = self.predictor.trained.manifest.prepared.ids[1].first;
        let mut seen = self.seen.of(user).iter().peekable();
        let items: Vec<u32> = (0..self.items).filter(|item| seen.next_if_eq(&item).is_none()).collect();
        let mut scored = Vec::with_capacity(items.len());
        for items in items.chunks(self.predictor.rows) {
            let ids = items.iter().flat_map(|item| [user, first + *item as u64]).collect();
            let scores = self.predictor.logits(vec![0.0; items.len()], ids, Vec::new());
            scored.extend(scores.column(0).iter().copied().zip(items.iter().copied()));
        }
        // Of equal scores, the first item.
        let order = |a: &(f32, u32), b: &(f32, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        if scored.len() > self.most {
            scored.select_nth_unstable_by(self.most, order);
            scored.truncate(self.most);
        }
        scored.sort_unstable_by(order);
        scored
    }
}

/// What users have in the training set.
fn seen(trained: &Trained) -> Result<Seen> {
    let manifest = &trained.manifest;
    let way_out = "what users have cannot be left out; put the data in its place, or add --with-seen";
    let opened = data::open(&data::Files::any(), &manifest.job.data, manifest.job.seed).context(way_out)?;
    if opened.prepared.digest != manifest.prepared.digest {
        bail!("the data have changed since {} was trained on them: {way_out}", trained.path.display());
    }
    let first = manifest.prepared.ids[1].first;
    Ok(match &opened.train.targets {
        Targets::Seen(seen) => (**seen).clone(),
        Targets::Class(_) | Targets::Value(_) | Targets::Next => {
            let pairs = opened.train.ids.values.chunks_exact(2);
            Seen::new(pairs.map(|ids| (ids[0], (ids[1] - first) as u32)).collect())
        }
    })
}

impl Answers for Recommender<'_> {
    fn needs(&self) -> Vec<&str> {
        vec![&self.predictor.trained.manifest.prepared.ids[0].columns[0]]
    }

    fn columns(&self) -> Vec<&'static str> {
        vec!["rank", "item", "score"]
    }

    fn read(&self, fields: &[(String, Value)]) -> Result<(Vec<f32>, Vec<u64>)> {
        let trained = self.predictor.trained;
        let field = &trained.manifest.prepared.ids[0];
        let column = field.columns[0].clone();
        let value = fields.iter().find(|(name, _)| *name == column).map(|(_, value)| cell(value));
        let user = value.ok_or(DataError::CellAbsent { column: column.clone() })?;
        let wrong = |cell: &str| DataError::CellUnknown { column: column.clone(), cell: cell.into() };
        let id = field.id(std::iter::once(user.trim()), "").map_err(wrong)?;
        if id == NO_ID {
            bail!("column `{column}` is empty; fill it in, or remove the row");
        }
        if !trained.rows.has(id) {
            bail!(
                "the model has learnt nothing of the user `{}`: it was trained on no sample of theirs; correct it, or remove the row",
                user.trim()
            );
        }
        Ok((Vec::new(), vec![id]))
    }

    fn answer(&mut self, rows: &[Row]) -> Vec<Vec<Fields>> {
        let names = &self.predictor.trained.manifest.prepared.ids[1];
        let answer = |(place, (score, item)): (usize, (f32, u32))| {
            let values = [json!(place + 1), json!(names.value(item as u64)), json!(score)];
            ["rank", "item", "score"].map(String::from).into_iter().zip(values).collect()
        };
        rows.iter().map(|row| self.best(row.ids[0]).into_iter().enumerate().map(answer).collect()).collect()
    }

    fn list(&self) -> Option<&'static str> {
        Some("items")
    }
}
