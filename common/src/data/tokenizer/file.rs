//! Hugging Face's `tokenizer.json`.

use crate::data::{DataError, reader};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

/// Bytes of a file, at most: workers are told its text, which a message may need twice the bytes for.
const MOST_BYTES: u64 = 48 << 20;

/// Bytes of a text that become tokens at once, at least: meanwhile they take 200 times as many.
const PIECE: usize = 1 << 20;

/// A text in pieces. They end with a line that has a letter or digit behind it, and no space at its end: there most pre-tokenizers cut
/// a text, too, whatever they look ahead for. Those that put something before a text (`Metaspace`) do so before each piece.
fn pieces(text: &str, least: usize) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let ends = |at: &usize| {
            rest.as_bytes()[at - 1] == b'\n'
                && rest[..at - 1].ends_with(|c: char| !c.is_whitespace())
                && rest[*at..].starts_with(char::is_alphanumeric)
        };
        let (piece, after) = rest.split_at((least..rest.len()).find(ends).unwrap_or(rest.len()));
        rest = after;
        Some(piece).filter(|piece| !piece.is_empty())
    })
}

/// The text of a `tokenizer.json`, and what was read from it; cheap to clone.
#[derive(Clone, Debug)]
pub struct Json {
    text: Arc<str>,
    tokenizer: Arc<inner::Tokenizer>,
}

impl Json {
    /// The tokenizer in a file.
    ///
    /// # Errors
    /// A file that cannot be read, is no tokenizer, or none that gives each text the same tokens every time.
    pub fn open(path: &Path) -> Result<Json, DataError> {
        let wrong = |why| DataError::Tokenizer { path: path.display().to_string(), why };
        Json::new(&text(path)?).map_err(wrong)
    }

    fn new(text: &str) -> Result<Json, String> {
        Ok(Json { text: text.into(), tokenizer: inner::Tokenizer::new(text)?.into() })
    }

    pub fn text(&self) -> &str {
        &self.text
    }

    /// One more than the largest id.
    pub fn vocabulary(&self) -> usize {
        self.tokenizer.vocabulary()
    }

    /// The ids of a text's tokens; none is added to them.
    ///
    /// # Errors
    /// A text that the tokenizer has no tokens for.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, DataError> {
        let mut tokens = Vec::new();
        for piece in pieces(text, PIECE) {
            tokens.extend(self.tokenizer.encode(piece).map_err(|why| DataError::NoTokens { why })?);
        }
        Ok(tokens)
    }

    /// The text of some tokens.
    ///
    /// # Errors
    /// Tokens that the tokenizer has no text for.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, DataError> {
        self.tokenizer.decode(tokens).map_err(|why| DataError::Undecoded { why })
    }
}

/// The text of a file that should be a tokenizer.
pub fn text(path: &Path) -> Result<String, DataError> {
    let (mut text, name) = (String::new(), path.display().to_string());
    let read = reader(path).and_then(|file| file.take(MOST_BYTES + 1).read_to_string(&mut text));
    match read {
        Ok(_) if text.len() as u64 > MOST_BYTES => {
            Err(DataError::Tokenizer { path: name, why: format!("it has more than {MOST_BYTES} bytes") })
        }
        read => read.map(|_| text).map_err(DataError::read(&name)),
    }
}

impl PartialEq for Json {
    fn eq(&self, other: &Json) -> bool {
        self.text == other.text
    }
}

/// As its text.
impl Serialize for Json {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.text.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Json, D::Error> {
        let text = String::deserialize(deserializer)?;
        Json::new(&text).map_err(|why| de::Error::custom(format!("its tokenizer cannot be used: {why}")))
    }
}

#[cfg(feature = "tokenizers")]
mod inner {
    use crate::data::MOST_TOKENS;
    use serde::{Deserialize, de::IgnoredAny};
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use tokenizers::{ModelWrapper, PostProcessorWrapper};

    #[derive(Debug)]
    pub struct Tokenizer {
        tokenizer: tokenizers::Tokenizer,
        vocabulary: usize,
    }

    /// What all such files have: of others the crate does not say what is missing.
    #[derive(Deserialize)]
    struct Outline {
        #[serde(rename = "model")]
        _model: IgnoredAny,
    }

    /// What the crate gives. It panics at some files, which is an error as any other.
    fn guarded<T>(run: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
        match catch_unwind(AssertUnwindSafe(run)) {
            Ok(done) => done.map_err(|e| e.to_string()),
            Err(_) => Err("the tokenizer itself fails, its file may be damaged".into()),
        }
    }

    impl Tokenizer {
        pub fn new(text: &str) -> Result<Tokenizer, String> {
            let Outline { .. } = serde_json::from_str(text).map_err(|e| e.to_string())?;
            let mut tokenizer: tokenizers::Tokenizer = guarded(|| text.parse())?;
            // How long a sample is, and what is before and behind it, the job says.
            guarded(|| tokenizer.with_truncation(None).map(|_| ()))?;
            tokenizer.with_padding(None).with_post_processor(None::<PostProcessorWrapper>);
            if let ModelWrapper::BPE(bpe) = tokenizer.get_model()
                && bpe.dropout.is_some_and(|share| share > 0.0)
            {
                return Err("it leaves merges out at random: set its `dropout` to null".into());
            }
            let mut ids: Vec<u32> = tokenizer.get_vocab(true).into_values().collect();
            ids.sort_unstable();
            if let Some(twice) = ids.windows(2).find(|pair| pair[0] == pair[1]) {
                return Err(format!("two of its tokens have the id {}", twice[0]));
            }
            // There may be ids that no token has.
            let last = ids.last().map_or(0, |last| *last as usize + 1);
            let vocabulary = last.max(tokenizer.get_vocab_size(true));
            // A text column's tokens are one more.
            if !(1..MOST_TOKENS).contains(&vocabulary) {
                return Err(format!("its ids end at {vocabulary}, which must be from 1 to {}", MOST_TOKENS - 1));
            }
            Ok(Tokenizer { tokenizer, vocabulary })
        }

        pub fn vocabulary(&self) -> usize {
            self.vocabulary
        }

        pub fn encode(&self, text: &str) -> Result<Vec<u32>, String> {
            guarded(|| Ok(self.tokenizer.encode_fast(text, false)?.get_ids().to_vec()))
        }

        pub fn decode(&self, tokens: &[u32]) -> Result<String, String> {
            guarded(|| self.tokenizer.decode(tokens, false))
        }
    }
}

#[cfg(not(feature = "tokenizers"))]
mod inner {
    /// There is none.
    #[derive(Debug)]
    pub enum Tokenizer {}

    impl Tokenizer {
        pub fn new(_: &str) -> Result<Tokenizer, String> {
            Err("this program was built without such tokenizers (build it with `--features tokenizers`)".into())
        }

        pub fn vocabulary(&self) -> usize {
            match *self {}
        }

        pub fn encode(&self, _: &str) -> Result<Vec<u32>, String> {
            match *self {}
        }

        pub fn decode(&self, _: &[u32]) -> Result<String, String> {
            match *self {}
        }
    }
}

#[cfg(all(test, feature = "tokenizers"))]
mod tests;

#[cfg(all(test, not(feature = "tokenizers")))]
mod tests {
    use super::*;

    #[test]
    fn a_program_without_the_crate_names_its_feature() {
        let error = serde_json::from_str::<Json>("\"{}\"").unwrap_err().to_string();
        assert!(error.contains("--features tokenizers"), "{error}");
    }
}
