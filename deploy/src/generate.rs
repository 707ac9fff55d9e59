//! `unisono predict --generate`: text that a language model goes on with.

use crate::Wrong;
use crate::out::Out;
use crate::predict::is_broken_pipe;
use crate::trained::{Trained, load};
use anyhow::{Context, Result, anyhow};
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use unisono_common::data::{Batch, Targets, Tokenizer, Tokens};
use unisono_common::rng::{Key, Purpose};
use unisono_common::train::{self, Workspace};

/// How the next token is chosen.
#[derive(clap::Args, Clone, Copy, Debug)]
pub struct Sampling {
    /// With --generate: how many tokens
    #[arg(long, requires = "generate", default_value_t = 400)]
    tokens: usize,
    /// With --generate: below 1 bolder choices become rarer, above 1 more frequent; 0 always takes the likeliest token
    #[arg(long, requires = "generate", default_value_t = 1.0)]
    temperature: f64,
    /// Of a model of users and items: gives the K best items for the user of each row, instead of a prediction. With --generate:
    /// chooses among so many of the likeliest tokens
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
    /// With --generate: chooses among the likeliest tokens that together have this probability
    #[arg(long, requires = "generate", value_name = "P")]
    top_p: Option<f64>,
    /// With --generate: another seed gives another text, the same one the same
    #[arg(long, requires = "generate", default_value_t = 0)]
    seed: u64,
}

impl Sampling {
    fn check(&self) -> Result<()> {
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return Err(anyhow!("--temperature must be a number of at least 0, not {}", self.temperature));
        }
        if self.top_k == Some(0) {
            return Err(anyhow!("--top-k must be at least 1"));
        }
        match self.top_p {
            Some(p) if !(p > 0.0 && p <= 1.0) => Err(anyhow!("--top-p must be above 0 and at most 1, not {p}")),
            _ => Ok(()),
        }
    }

    /// The `i`-th token, from its logits.
    fn pick(&self, logits: &[f32], i: u64) -> usize {
        let mut order: Vec<usize> = (0..logits.len()).collect();
        // The likeliest first; of equal ones the first.
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
        if self.temperature == 0.0 {
            return order[0];
        }
        order.truncate(self.top_k.unwrap_or(usize::MAX));
        let top = logits[order[0]] as f64;
        let weights: Vec<f64> = order.iter().map(|&t| ((logits[t] as f64 - top) / self.temperature).exp()).collect();
        let enough = self.top_p.unwrap_or(1.0) * weights.iter().sum::<f64>();
        let mut sum = 0.0;
        let kept = 1 + weights
            .iter()
            .take_while(|w| {
                sum += **w;
                sum < enough
            })
            .count();
        let weights = &weights[..kept.min(weights.len())];
        let mut left = Key::new(self.seed, Purpose::Generate).uniform(i) as f64 * weights.iter().sum::<f64>();
        let chosen = weights.iter().position(|w| {
            left -= w;
            left < 0.0
        });
        order[chosen.unwrap_or(weights.len() - 1)]
    }
}

/// Writes what follows `prompt`, token by token.
pub fn generate(checkpoint: &Path, prompt: &str, sampling: Sampling) -> Result<ExitCode> {
    sampling.check().map_err(Wrong)?;
    let trained = load(checkpoint).map_err(Wrong)?;
    let prepared = &trained.manifest.prepared;
    let tokens = prepared.tokens.as_ref().filter(|_| prepared.predicts_next());
    let Some(Tokens { tokenizer: Some(tokenizer), .. }) = tokens else {
        let what = "was not trained to go on with a text; leave --generate out, and give it rows";
        return Err(Wrong(anyhow!("{} {what}", trained.path.display())).into());
    };
    let mut text = tokenizer.encoder().encode(prompt).context("the prompt").map_err(Wrong)?;
    let given = text.len();
    if text.is_empty() {
        // Something has to come before the first token: the end of a line, where there is one.
        text.push(tokenizer.encoder().encode("\n").ok().and_then(|tokens| tokens.last().copied()).unwrap_or(0));
    }
    let before = text.len() - given;
    let mut said = Said { tokenizer, known: before, written: before, out: Out::new() };
    let done: Result<()> = (|| {
        said.write(&text, false)?;
        let mut writer = Writer::new(&trained);
        for i in 0..sampling.tokens as u64 {
            let logits = writer.logits(&text);
            if logits.iter().any(|logit| !logit.is_finite()) {
                return Err(anyhow!("the model's outputs are not finite: its weights are spoilt"));
            }
            text.push(sampling.pick(logits, i) as u32);
            said.write(&text, false)?;
        }
        said.write(&text, true)
    })();
    match done {
        Err(e) if is_broken_pipe(&e) => return Ok(ExitCode::SUCCESS),
        done => done?,
    }
    println!();
    Ok(ExitCode::SUCCESS)
}

/// What stands for a part of a character.
const PART: &[u8] = "\u{fffd}".as_bytes();

/// Text that is written as its tokens come.
struct Said<'a, W> {
    tokenizer: &'a Tokenizer,
    /// Tokens before which nothing changes how others are written.
    known: usize,
    /// Tokens that were written.
    written: usize,
    out: W,
}

impl<W: Write> Said<'_, W> {
    /// Writes what the last of `tokens` add to the text: what a token is depends on those before it. A character of several
    /// tokens is written when all of them are there, or `all` that there will be.
    fn write(&mut self, tokens: &[u32], all: bool) -> Result<()> {
        let before = self.tokenizer.decode(&tokens[self.known..self.written])?;
        let text = self.tokenizer.decode(&tokens[self.known..])?;
        if all || !text.ends_with(PART) {
            self.out.write_all(text.get(before.len()..).unwrap_or_default())?;
            self.out.flush()?;
            (self.known, self.written) = (self.written, tokens.len());
        }
        Ok(())
    }
}

/// A model with the memory to go on with one text.
struct Writer<'a> {
    trained: &'a Trained,
    workspace: Workspace,
    batch: Batch,
    logits: Vec<f32>,
}

impl<'a> Writer<'a> {
    fn new(trained: &'a Trained) -> Writer<'a> {
        let batch = Batch { inputs: Vec::new(), targets: Targets::Class(Vec::new()), samples: 1, ..Batch::empty() };
        Writer { workspace: Workspace::new(&trained.model, 1, 1), batch, logits: Vec::new(), trained }
    }

    /// Logits of what follows `text`, of which the model sees the end that fits into its context.
    fn logits(&mut self, text: &[u32]) -> &[f32] {
        let Trained { model, weights, .. } = self.trained;
        let context = model.input_len();
        let seen = &text[text.len().saturating_sub(context)..];
        let inputs = &mut self.batch.inputs;
        inputs.clear();
        inputs.extend(seen.iter().map(|&token| token as f32));
        // A position does not see those behind it.
        inputs.resize(context, 0.0);
        let logits = train::evaluate(model, weights, &self.batch, &mut self.workspace);
        self.logits.clear();
        self.logits.extend(logits.row(seen.len() - 1));
        &self.logits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [0.0, 2.0, 1.0, 2.0, -1.0];

    fn sampling(temperature: f64, top_k: Option<usize>, top_p: Option<f64>) -> Sampling {
        Sampling { tokens: 0, temperature, top_k, top_p, seed: 5 }
    }

    /// Shares of many draws.
    fn shares(sampling: Sampling) -> [f64; 5] {
        let mut shares = [0.0; 5];
        let draws = 40_000;
        (0..draws).for_each(|i| shares[sampling.pick(&LOGITS, i)] += 1.0 / draws as f64);
        shares
    }

    /// The softmax of those that are kept.
    fn softmax(kept: &[usize], temperature: f64) -> [f64; 5] {
        let weight = |i: usize| if kept.contains(&i) { (LOGITS[i] as f64 / temperature).exp() } else { 0.0 };
        let sum: f64 = (0..5).map(weight).sum();
        std::array::from_fn(|i| weight(i) / sum)
    }

    #[test]
    fn what_is_written_token_by_token_is_the_whole_text() {
        let words = ["la", "le", "lu"].map(String::from).to_vec();
        for tokenizer in [
            Tokenizer::Bytes,
            Tokenizer::Characters { characters: "\u{fffd}aé".into() },
            Tokenizer::Words { words, ngrams: 1, buckets: 0 },
        ] {
            // The first is not written; the last is, though it stands for a part of a character.
            let tokens = [2, 1, 0, 1, 2, 0];
            let mut said = Said { tokenizer: &tokenizer, known: 1, written: 1, out: Vec::new() };
            (1..=tokens.len()).for_each(|n| said.write(&tokens[..n], false).unwrap());
            said.write(&tokens, true).unwrap();
            assert_eq!(said.out, tokenizer.decode(&tokens[1..]).unwrap(), "{tokenizer:?}");
        }
    }

    #[test]
    fn tokens_come_as_often_as_their_probability_says() {
        for (sampling, kept) in [
            (sampling(1.0, None, None), vec![0, 1, 2, 3, 4]),
            (sampling(0.5, None, None), vec![0, 1, 2, 3, 4]),
            (sampling(1.0, Some(3), None), vec![1, 2, 3]),
            // Of equally likely tokens the first.
            (sampling(1.0, Some(1), None), vec![1]),
            (sampling(1.0, None, Some(0.01)), vec![1]),
            // The two likeliest have 0.785 together, with the third 0.93.
            (sampling(1.0, None, Some(0.78)), vec![1, 3]),
            (sampling(1.0, None, Some(0.8)), vec![1, 2, 3]),
            (sampling(2.0, Some(9), Some(1.0)), vec![0, 1, 2, 3, 4]),
        ] {
            let (got, want) = (shares(sampling), softmax(&kept, sampling.temperature));
            assert!(
                got.iter().zip(want).all(|(got, want)| (got - want).abs() < 0.01),
                "{sampling:?}: {got:?} {want:?}"
            );
        }
        assert!((0..100).all(|i| sampling(0.0, None, None).pick(&LOGITS, i) == 1));
    }
}
