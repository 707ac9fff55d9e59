//! Plain text, as windows of tokens whose next ones are to be predicted.

use super::tokenizer::{Tokenizer, Wanted};
use super::{DataError, Dataset, Features, Files, Prepared, Raw, Scale, Targets, Tokens, read_text, table};
use crate::job;

/// The tokens of a stored window: its own, and as many of what follows, so that an epoch may begin its windows anywhere.
pub(super) fn stored(context: usize) -> usize {
    2 * context
}

/// Cuts `tokens` into windows that begin `context` tokens apart; one whose tokens end too early is left out (`whole`), or
/// filled up with zeros, which evaluation does not look at.
pub(super) fn windows(tokens: &[u32], vocabulary: usize, context: usize, whole: bool) -> Dataset {
    let features = if vocabulary <= 256 {
        Features::U8(cut(tokens, context, whole, |token| token as u8))
    } else {
        Features::U32(cut(tokens, context, whole, |token| token))
    };
    Dataset::new(vec![stored(context)], features, Targets::Next)
}

fn cut<T: Clone + Default>(tokens: &[u32], context: usize, whole: bool, as_stored: impl Fn(u32) -> T) -> Vec<T> {
    let least = if whole { stored(context) } else { context + 1 };
    let count = if tokens.len() < least { 0 } else { (tokens.len() - least) / context + 1 };
    let mut all = Vec::with_capacity(count * stored(context));
    for from in (0..count).map(|i| i * context) {
        let window = &tokens[from..tokens.len().min(from + stored(context))];
        all.extend(window.iter().map(|&token| as_stored(token)));
        all.resize(all.len() + stored(context) - window.len(), T::default());
    }
    all
}

/// Reads a job's text; what is tested is a file of its own, or the last part of the only one.
pub(super) fn read(files: &Files, spec: &job::Text, known: Option<&Tokenizer>) -> Result<Raw, DataError> {
    let job::Text { base, train, test, holdout, column, tokenizer, context } = spec;
    let wanted = Wanted::new(files, base, tokenizer, known)?;
    let open = |path: &str| -> Result<_, DataError> {
        let found = files.find(base, path)?;
        let text = match column {
            Some((column, form)) => table::texts(files, &job::Table::of_texts(base, path, column, form))?,
            None => read_text(&found)?,
        };
        Ok((text, found.display().to_string()))
    };
    let (text, path) = open(train)?;
    let (train, test, test_path) = match (test, holdout) {
        (Some(test), _) => {
            let (test, test_path) = open(test)?;
            (text, Some(test), test_path)
        }
        (None, Some(share)) => {
            let keep = ((1.0 - share) * text.chars().count() as f64) as usize;
            let at = text.char_indices().nth(keep).map_or(text.len(), |(at, _)| at);
            let (train, test) = text.split_at(at);
            (train.to_string(), Some(test.to_string()), path.clone())
        }
        (None, None) => (text, None, path.clone()),
    };
    // A test needs a token for each of its characters, too; words have one for those that are not known.
    let tested = test.iter().filter(|_| matches!(wanted, Wanted::Characters));
    let tokenizer = wanted.learn([&train].into_iter().chain(tested).map(String::as_str));
    let vocabulary = tokenizer.vocabulary();
    let cut = |text: &str, path: &str, whole: bool| -> Result<_, DataError> {
        let tokens = tokenizer.encoder().encode(text).map_err(|error| match error {
            DataError::NoTokens { why } => DataError::FileTokens { path: path.into(), why },
            other => other,
        })?;
        let data = windows(&tokens, vocabulary, *context, whole);
        if data.samples() == 0 {
            let least = if whole { stored(*context) } else { *context + 1 };
            let (path, tokens) = (path.into(), tokens.len());
            return Err(DataError::ShortText { path, tokens, context: *context, least });
        }
        Ok((data, tokens.len() as f64 / text.chars().count() as f64))
    };
    let (train, each) = cut(&train, &path, true)?;
    let test = test.map(|test| cut(&test, &test_path, false)).transpose()?;
    let tokens_per_character = test.as_ref().map_or(each, |(_, each)| *each);
    let tokens = Some(Tokens { tokenizer: Some(tokenizer), vocabulary, tokens_per_character, column: None });
    Ok(Raw { tokens, ..Raw::new(train, test.map(|(test, _)| test), None, Scale { per_feature: false, unit: 1.0 }) })
}

impl Prepared {
    /// Where an epoch's windows begin: so many tokens behind where they were stored.
    pub(super) fn shift(&self, draw: Option<super::Draw<'_>>) -> usize {
        draw.and_then(|draw| draw.key()).map_or(0, |key| key.below(0, self.shape[0] as u64) as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Batch, Draw};
    use proptest::prelude::*;
    use std::path::Path;

    fn spec(folder: &Path, text: &str) -> job::Text {
        std::fs::write(folder.join("text.txt"), text).unwrap();
        job::Text {
            base: folder.display().to_string(),
            train: "text.txt".into(),
            test: None,
            holdout: None,
            column: None,
            tokenizer: job::Tokenizer::Characters,
            context: 4,
        }
    }

    /// In whatever form they are, texts are read as the same ones in a file of plain text, with a line each.
    #[test]
    fn a_column_of_a_table_is_read_as_its_texts_one_after_another() {
        let folder = tempfile::tempdir().unwrap();
        let texts = ["To be,\nor not to be,", "that is \"the\" question", "whether"];
        let plain = spec(folder.path(), &texts.join("\n"));
        let want = read(&Files::default(), &plain, None).unwrap();
        let quoted = |text: &str| format!("\"{}\"", text.replace('"', "\"\""));
        let lined = |separator: &str| -> String {
            // A row without a text adds none, not even a line end.
            let rows = texts.iter().enumerate().map(|(i, text)| format!("{i}{separator}{}\n", quoted(text)));
            format!("id{separator}body\n9{separator}\n") + &rows.collect::<String>()
        };
        let json = |text: &&str| serde_json::json!({ "id": [1], "body": text }).to_string() + "\n";
        let objects = texts.iter().map(json).collect::<String>() + "{\"id\": 4}\n";
        let files =
            [("a.csv", lined(",")), ("a.tsv", lined("\t")), ("a.jsonl", objects.clone()), ("a.ndjson", objects)];
        let of = |path: &str, column: &str| {
            let form = job::Form::of(path).unwrap();
            job::Text { train: path.into(), column: Some((column.into(), form)), ..plain.clone() }
        };
        for (path, content) in files {
            std::fs::write(folder.path().join(path), content).unwrap();
            let raw = read(&Files::default(), &of(path, "body"), None).unwrap();
            assert_eq!((raw.train, raw.tokens), (want.train.clone(), want.tokens.clone()), "{path}");
        }
        let says = |path: &str, column: &str, parts: &[&str]| {
            let message = read(&Files::default(), &of(path, column), None).map(|_| ()).unwrap_err().to_string();
            assert!(parts.iter().all(|part| message.contains(part)), "{message}");
        };
        says("a.csv", "bodi", &["bodi", "a.csv", "body"]);
        std::fs::write(folder.path().join("b.jsonl"), "{\"body\": \"a\"}\n{\"body\": [1]}\n").unwrap();
        says("b.jsonl", "body", &["b.jsonl:2", "body", "a list"]);
    }

    proptest! {
        #[test]
        fn an_epochs_windows_follow_one_another_and_predict_the_next_token(
            length in 8usize..90, context in 1usize..9, epoch in 0u64..50, large in any::<bool>(),
        ) {
            prop_assume!(length >= 2 * context);
            let tokens: Vec<u32> = (0..length as u32).collect();
            let vocabulary = if large { 1000 } else { 100 };
            let data = windows(&tokens, vocabulary, context, true);
            prop_assert_eq!(data.samples(), length / context - 1);
            prop_assert_eq!(matches!(data.features, Features::U32(_)), large);
            let tokens = Tokens { tokenizer: None, vocabulary, tokens_per_character: 1.0, column: None };
            let scale = Scale { per_feature: false, unit: 1.0 };
            let raw = Raw { tokens: Some(tokens), ..Raw::new(data.clone(), None, None, scale) };
            let prepared = raw.prepare(false).prepared;
            let mut batch = Batch::empty();
            for draw in [None, Some(Draw::new(3, epoch, None))] {
                batch.fill(&data, &prepared, 0..data.samples(), draw, false);
                let first = batch.inputs[0];
                prop_assert!(first < context as f32 && (draw.is_some() || first == 0.0));
                let Targets::Class(next) = &batch.targets else { panic!("tokens are classes") };
                prop_assert_eq!((batch.inputs.len(), next.len()), (data.samples() * context, data.samples() * context));
                for (i, (token, next)) in batch.inputs.iter().zip(next).enumerate() {
                    prop_assert_eq!((*token, *next), (first + i as f32, first as u32 + i as u32 + 1));
                }
            }
        }
    }

    #[test]
    fn the_end_of_a_text_is_held_out_and_all_of_it_is_tested() {
        let folder = tempfile::tempdir().unwrap();
        let text: String = ('a'..='z').chain('A'..='Z').collect();
        let spec = job::Text { holdout: Some(0.25), ..spec(folder.path(), &text) };
        let raw = read(&Files::default(), &spec, None).unwrap();
        // 39 characters to train on: the windows at 0, 4, .., 28 and what follows each; 13 to test: three windows of 4 + 1.
        let test = raw.test.unwrap();
        assert_eq!((raw.train.samples(), test.samples()), (8, 3));
        assert_eq!(raw.tokens.unwrap().vocabulary, 52);
        let Features::U8(tokens) = &test.features else { panic!("a small vocabulary") };
        let last: String =
            tokens[2 * 8..].iter().map(|t| (if *t < 26 { b'A' + t } else { b'a' + t - 26 }) as char).collect();
        assert_eq!(last, "VWXYZAAA"); // zeros behind the end
    }

    #[test]
    fn a_text_that_is_too_short_says_how_long_it_must_be() {
        let folder = tempfile::tempdir().unwrap();
        let says = |spec: &job::Text, part: &str| {
            let message = read(&Files::default(), spec, None).map(|_| ()).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        };
        says(&spec(folder.path(), "abcdefg"), "7 tokens");
        says(&spec(folder.path(), ""), "text.txt");
        says(&job::Text { holdout: Some(0.1), ..spec(folder.path(), "abcdefghijklmnopqrst") }, "2 tokens");
    }
}
