//! From text to tokens, and back.

use super::DataError;
use crate::job;
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
}

impl Tokenizer {
    /// The tokenizer that the job asks for, of these texts.
    pub fn learn(spec: &job::Tokenizer, texts: &[&str]) -> Tokenizer {
        match spec {
            job::Tokenizer::Bytes => Tokenizer::Bytes,
            job::Tokenizer::Characters => {
                let characters: BTreeSet<char> = texts.iter().flat_map(|text| text.chars()).collect();
                Tokenizer::Characters { characters: characters.into_iter().collect() }
            }
        }
    }

    /// How many different tokens there are.
    pub fn vocabulary(&self) -> usize {
        match self {
            Tokenizer::Bytes => 256,
            Tokenizer::Characters { characters } => characters.chars().count(),
        }
    }

    /// The tokens of a text, each below [`Tokenizer::vocabulary`].
    ///
    /// # Errors
    /// A character that has no token.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, DataError> {
        match self {
            Tokenizer::Bytes => Ok(text.bytes().map(u32::from).collect()),
            Tokenizer::Characters { characters } => {
                let ids: HashMap<char, u32> = characters.chars().zip(0..).collect();
                let id = |character| ids.get(&character).copied().ok_or(DataError::Character { character });
                text.chars().map(id).collect()
            }
        }
    }

    /// The text of some tokens, as bytes: a character may be more tokens than one.
    pub fn decode(&self, tokens: &[u32]) -> Vec<u8> {
        match self {
            Tokenizer::Bytes => tokens.iter().map(|&token| token as u8).collect(),
            Tokenizer::Characters { characters } => {
                let all: Vec<char> = characters.chars().collect();
                tokens.iter().filter_map(|&token| all.get(token as usize)).collect::<String>().into_bytes()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_text_comes_back_from_its_tokens(text in any::<String>(), more in any::<String>()) {
            for spec in [job::Tokenizer::Bytes, job::Tokenizer::Characters] {
                let tokenizer = Tokenizer::learn(&spec, &[&text, &more]);
                for text in [&text, &more] {
                    let tokens = tokenizer.encode(text).unwrap();
                    prop_assert!(tokens.iter().all(|&token| (token as usize) < tokenizer.vocabulary()));
                    prop_assert_eq!(&tokenizer.decode(&tokens), text.as_bytes());
                }
            }
        }
    }

    #[test]
    fn a_character_that_the_data_do_not_have_is_named() {
        let tokenizer = Tokenizer::learn(&job::Tokenizer::Characters, &["banana", "nab"]);
        assert_eq!(tokenizer, Tokenizer::Characters { characters: "abn".into() });
        assert_eq!(tokenizer.encode("bann").unwrap(), [1, 0, 2, 2]);
        assert!(tokenizer.encode("bandana").unwrap_err().to_string().contains("'d'"));
    }
}
