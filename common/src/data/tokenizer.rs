//! From text to tokens, and back.

mod file;

pub use file::Json;

use super::{DataError, Files};
use crate::job;
use crate::rng::{Key, Purpose};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeSet, HashMap};

/// What it takes to read and write a model's text; kept in checkpoints.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Tokenizer {
    /// A token for each byte; 256 of them.
    Bytes,
    /// A token for each character that the data have, in the order of their code points.
    Characters { characters: String },
    /// A token for each of `words`, one for all others, and for runs of 2 to `ngrams` words those of `buckets` that their hashes
    /// name (Joulin et al., "Bag of Tricks for Efficient Text Classification", 2016, section 2.1).
    Words { words: Vec<String>, ngrams: usize, buckets: usize },
    /// The tokens of a `tokenizer.json`.
    File { json: Json },
}

/// Words, and buckets, of a vocabulary, and words of a run, at most.
pub(crate) const MOST_WORDS: usize = 1 << 22;
pub(crate) const MOST_NGRAMS: usize = 8;

/// What stands for a word that has no token.
const UNKNOWN: &str = "<unknown>";

/// The words of a text in small letters: letters and digits that follow one another, or any other character that is no space.
fn words(text: &str) -> Vec<String> {
    let (mut all, mut open) = (Vec::new(), String::new());
    for c in text.chars() {
        if c.is_alphanumeric() {
            open.extend(c.to_lowercase());
            continue;
        }
        if !open.is_empty() {
            all.push(std::mem::take(&mut open));
        }
        if !c.is_whitespace() {
            all.push(c.into());
        }
    }
    all.extend((!open.is_empty()).then_some(open));
    all
}

/// A job's tokenizer before its texts are read.
pub(super) enum Wanted {
    Known(Tokenizer),
    Characters,
    Words { most: usize, ngrams: usize, buckets: usize },
}

/// What counts the tokens of a text.
pub(super) type Count<'a> = dyn Fn(&str) -> Result<usize, DataError> + 'a;

impl Wanted {
    /// The tokenizer that the job asks for; where a model was prepared already, that model's.
    ///
    /// # Errors
    /// A file that is none, or another one than the model's.
    pub fn new(
        files: &Files,
        base: &str,
        spec: &job::Tokenizer,
        model: Option<&Tokenizer>,
    ) -> Result<Wanted, DataError> {
        Ok(match (spec, model) {
            (job::Tokenizer::File { path }, Some(Tokenizer::File { json })) => {
                // The model has its own: the file need not be there any more.
                if let Ok(found) = files.find(base, path)
                    && file::text(&found)? != json.text()
                {
                    return Err(DataError::OtherTokenizer { what: found.display().to_string() });
                }
                Wanted::Known(Tokenizer::File { json: json.clone() })
            }
            (job::Tokenizer::Bytes, Some(model @ Tokenizer::Bytes))
            | (job::Tokenizer::Characters, Some(model @ Tokenizer::Characters { .. })) => Wanted::Known(model.clone()),
            (
                job::Tokenizer::Words { ngrams, buckets, .. },
                Some(model @ Tokenizer::Words { ngrams: n, buckets: b, .. }),
            ) if ngrams == n && (*ngrams == 1 || buckets == b) => Wanted::Known(model.clone()),
            (spec, Some(_)) => {
                let what = match spec {
                    job::Tokenizer::Bytes => "bytes",
                    job::Tokenizer::Characters => "characters",
                    job::Tokenizer::Words { .. } => "words, with other runs of them",
                    job::Tokenizer::File { path } => path,
                };
                return Err(DataError::OtherTokenizer { what: what.into() });
            }
            (job::Tokenizer::Bytes, None) => Wanted::Known(Tokenizer::Bytes),
            (job::Tokenizer::Characters, None) => Wanted::Characters,
            (&job::Tokenizer::Words { most, ngrams, buckets }, None) => Wanted::Words { most, ngrams, buckets },
            (job::Tokenizer::File { path }, None) => {
                Wanted::Known(Tokenizer::File { json: Json::open(&files.find(base, path)?)? })
            }
        })
    }

    /// What counts a text's tokens, whatever is learnt.
    pub fn counter(&self) -> Box<Count<'_>> {
        match *self {
            Wanted::Known(ref tokenizer) => {
                let encoder = tokenizer.encoder();
                Box::new(move |text| Ok(encoder.encode(text)?.len()))
            }
            Wanted::Characters => Box::new(|text| Ok(text.chars().count())),
            Wanted::Words { ngrams, .. } => Box::new(move |text| {
                let words = words(text).len();
                // As many runs of n words end as there are words, but for the first n - 1.
                Ok((1..=ngrams).map(|n| (words + 1).saturating_sub(n)).sum())
            }),
        }
    }

    /// The tokenizer, of these texts.
    pub fn learn<'t>(&self, texts: impl Iterator<Item = &'t str>) -> Tokenizer {
        match *self {
            Wanted::Known(ref tokenizer) => tokenizer.clone(),
            Wanted::Characters => {
                let characters: BTreeSet<char> = texts.flat_map(str::chars).collect();
                Tokenizer::Characters { characters: characters.into_iter().collect() }
            }
            Wanted::Words { most, ngrams, buckets } => {
                let mut counts: HashMap<String, u64> = HashMap::new();
                texts.flat_map(words).for_each(|word| *counts.entry(word).or_default() += 1);
                let mut counts: Vec<(String, u64)> = counts.into_iter().collect();
                // The most frequent first; of equally frequent ones in the order of letters.
                counts.sort_by(|(a, n), (b, m)| m.cmp(n).then_with(|| a.cmp(b)));
                let words = counts.into_iter().take(most).map(|(word, _)| word).collect();
                Tokenizer::Words { words, ngrams, buckets: if ngrams > 1 { buckets } else { 0 } }
            }
        }
    }
}

impl Tokenizer {
    /// Whether it is one that a job can ask for.
    pub fn is_sound(&self) -> bool {
        match self {
            // A file's was looked at when it was read.
            Tokenizer::Bytes | Tokenizer::Characters { .. } | Tokenizer::File { .. } => true,
            Tokenizer::Words { words, ngrams, buckets } => {
                let hashed = *ngrams == 1 || *buckets > 0;
                hashed && (1..=MOST_NGRAMS).contains(ngrams) && words.len().max(*buckets) <= MOST_WORDS
            }
        }
    }

    /// How many different tokens there are.
    pub fn vocabulary(&self) -> usize {
        match self {
            Tokenizer::Bytes => 256,
            Tokenizer::Characters { characters } => characters.chars().count(),
            Tokenizer::Words { words, buckets, .. } => words.len() + 1 + buckets,
            Tokenizer::File { json } => json.vocabulary(),
        }
    }

    /// What turns texts into tokens.
    pub fn encoder(&self) -> Encoder<'_> {
        match self {
            Tokenizer::Bytes => Encoder::Bytes,
            Tokenizer::Characters { characters } => Encoder::Characters(characters.chars().zip(0..).collect()),
            Tokenizer::Words { words, ngrams, buckets } => Encoder::Words {
                ids: words.iter().map(String::as_str).zip(0..).collect(),
                ngrams: *ngrams,
                buckets: *buckets as u64,
            },
            Tokenizer::File { json } => Encoder::File(json),
        }
    }

    /// The text of some tokens, as bytes: a character may be more tokens than one.
    ///
    /// # Errors
    /// Tokens that a file's tokenizer has no text for.
    pub fn decode(&self, tokens: &[u32]) -> Result<Vec<u8>, DataError> {
        Ok(match self {
            Tokenizer::Bytes => tokens.iter().map(|&token| token as u8).collect(),
            Tokenizer::Characters { characters } => {
                let all: Vec<char> = characters.chars().collect();
                tokens.iter().filter_map(|&token| all.get(token as usize)).collect::<String>().into_bytes()
            }
            Tokenizer::Words { words, .. } => {
                let word = |&token: &u32| words.get(token as usize).map_or(UNKNOWN, String::as_str);
                tokens.iter().map(word).collect::<Vec<_>>().join(" ").into_bytes()
            }
            Tokenizer::File { json } => json.decode(tokens)?.into_bytes(),
        })
    }
}

/// A [`Tokenizer`] that is ready to read.
pub enum Encoder<'a> {
    Bytes,
    Characters(HashMap<char, u32>),
    Words { ids: HashMap<&'a str, u32>, ngrams: usize, buckets: u64 },
    File(&'a Json),
}

impl Encoder<'_> {
    /// The tokens of a text, each below [`Tokenizer::vocabulary`]; those of runs of words come after that of their last word.
    ///
    /// # Errors
    /// A character that has no token, and a text that a file's tokenizer has none for.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, DataError> {
        match self {
            Encoder::Bytes => Ok(text.bytes().map(u32::from).collect()),
            Encoder::Characters(ids) => {
                let id = |character| ids.get(&character).copied().ok_or(DataError::Character { character });
                text.chars().map(id).collect()
            }
            Encoder::Words { ids, ngrams, buckets } => {
                let (words, unknown) = (words(text), ids.len() as u32);
                let mut tokens = Vec::new();
                for (i, word) in words.iter().enumerate() {
                    tokens.push(ids.get(word.as_str()).copied().unwrap_or(unknown));
                    for n in 2..=(*ngrams).min(i + 1) {
                        let run = words[i + 1 - n..=i].iter();
                        let key = run.fold(Key::new(0, Purpose::Ngram), |key, word| key.named(word));
                        tokens.push(unknown + 1 + key.below(0, *buckets) as u32);
                    }
                }
                Ok(tokens)
            }
            Encoder::File(json) => json.encode(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn wanted(spec: &job::Tokenizer) -> Wanted {
        Wanted::new(&Files::default(), "", spec, None).unwrap()
    }

    proptest! {
        #[test]
        fn a_text_comes_back_from_its_tokens(text in any::<String>(), more in any::<String>()) {
            for spec in [job::Tokenizer::Bytes, job::Tokenizer::Characters] {
                let wanted = wanted(&spec);
                let tokenizer = wanted.learn([&text[..], &more].into_iter());
                for text in [&text, &more] {
                    let tokens = tokenizer.encoder().encode(text).unwrap();
                    prop_assert_eq!(wanted.counter()(text).unwrap(), tokens.len());
                    prop_assert!(tokens.iter().all(|&token| (token as usize) < tokenizer.vocabulary()));
                    prop_assert_eq!(&tokenizer.decode(&tokens).unwrap(), text.as_bytes());
                }
            }
        }

        #[test]
        fn words_are_counted_and_runs_of_them_hashed(text in "[a-d .!]{0,40}", most in 1usize..4, ngrams in 1usize..4) {
            let wanted = wanted(&job::Tokenizer::Words { most, ngrams, buckets: 8 });
            let tokenizer = wanted.learn([&text[..]].into_iter());
            let Tokenizer::Words { words: known, buckets, .. } = &tokenizer else { panic!("words") };
            let (all, count) = (words(&text), |word: &String| words(&text).iter().filter(|w| *w == word).count());
            // Nothing that is left out is more frequent than what is known.
            let least = known.iter().map(count).min().unwrap_or(0);
            prop_assert!(known.len() == most.min(all.iter().collect::<BTreeSet<_>>().len()));
            prop_assert!(all.iter().all(|word| known.contains(word) || count(word) <= least));
            prop_assert_eq!(*buckets, if ngrams > 1 { 8 } else { 0 });
            let tokens = tokenizer.encoder().encode(&text).unwrap();
            let runs: usize = (2..=ngrams).map(|n| (all.len() + 1).saturating_sub(n)).sum();
            prop_assert_eq!(tokens.len(), all.len() + runs);
            prop_assert_eq!(wanted.counter()(&text).unwrap(), tokens.len());
            let (of_words, of_runs): (Vec<u32>, Vec<u32>) = tokens.iter().partition(|t| **t as usize <= known.len());
            for (token, word) in of_words.iter().zip(&all) {
                prop_assert_eq!(known.get(*token as usize), known.contains(word).then_some(word));
            }
            prop_assert_eq!((of_words.len(), of_runs.len()), (all.len(), runs));
            prop_assert!(tokens.iter().all(|t| (*t as usize) < tokenizer.vocabulary()));
            // The beginning of a text has the beginning of its tokens.
            let start = text.rfind(' ').map_or("", |at| &text[..at]);
            prop_assert!(tokens.starts_with(&tokenizer.encoder().encode(start).unwrap()));
        }
    }

    #[test]
    fn words_are_letters_and_digits_or_single_signs() {
        assert_eq!(words("Don't  PAY £1000,\nÉté!"), ["don", "'", "t", "pay", "£", "1000", ",", "été", "!"]);
        let tokenizer = wanted(&job::Tokenizer::Words { most: 9, ngrams: 1, buckets: 5 }).learn(["b a a"].into_iter());
        let tokens = tokenizer.encoder().encode("A b c").unwrap();
        assert_eq!((&tokens[..], tokenizer.vocabulary()), (&[0, 1, 2][..], 3));
        assert_eq!(tokenizer.decode(&tokens).unwrap(), b"a b <unknown>");
    }

    #[test]
    fn a_character_that_the_data_do_not_have_is_named() {
        let tokenizer = wanted(&job::Tokenizer::Characters).learn(["banana", "nab"].into_iter());
        assert_eq!(tokenizer, Tokenizer::Characters { characters: "abn".into() });
        assert_eq!(tokenizer.encoder().encode("bann").unwrap(), [1, 0, 2, 2]);
        assert!(tokenizer.encoder().encode("bandana").unwrap_err().to_string().contains("'d'"));
    }
}
