use super::*;
use crate::data::Files;
use crate::data::tokenizer::{Tokenizer, Wanted};
use crate::job;
use proptest::prelude::*;
use serde_json::{Value, json};

/// Bytes in pairs and triples, with all that a file can ask for beside: two tokens of a text at most, 64 of each, and one before it.
fn pairs() -> Value {
    json!({
        "version": "1.0",
        "truncation": { "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0 },
        "padding": { "strategy": { "Fixed": 64 }, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
                     "pad_type_id": 0, "pad_token": "<s>" },
        "added_tokens": [{ "id": 0, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
                           "normalized": false, "special": true }],
        "normalizer": null,
        "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{ "SpecialToken": { "id": "<s>", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
            "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 1 } }],
            "special_tokens": { "<s>": { "id": "<s>", "ids": [0], "tokens": ["<s>"] } }
        },
        "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": { "<s>": 0, "a": 1, "b": 2, "Ġ": 3, "Ã": 4, "©": 5, "ab": 6, "Ġab": 7, "Ċ": 8, "ĊĊ": 9 },
            "merges": [["a", "b"], ["Ġ", "ab"], ["Ċ", "Ċ"]]
        }
    })
}

/// Whole words, of which "c" is none.
fn words() -> Value {
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": { "type": "Whitespace" }, "post_processor": null, "decoder": null,
        "model": { "type": "WordLevel", "vocab": { "a": 0, "b": 1 }, "unk_token": "<unk>" }
    })
}

/// `json` with one value replaced.
fn with(mut json: Value, at: &str, value: Value) -> Value {
    *json.pointer_mut(at).unwrap() = value;
    json
}

fn tokenizer(json: &Value) -> Tokenizer {
    Tokenizer::File { json: Json::new(&json.to_string()).unwrap() }
}

#[test]
fn ids_are_the_files_and_nothing_is_added_cut_or_filled_up() {
    let tokenizer = tokenizer(&pairs());
    assert_eq!(tokenizer.vocabulary(), 10);
    for (text, ids) in [
        ("ab abé\n", &[6, 7, 4, 5, 8][..]),
        ("", &[]),
        // A token that is written in the text is one.
        ("b<s> a", &[2, 0, 3, 1]),
    ] {
        assert_eq!(tokenizer.encoder().encode(text).unwrap(), ids, "{text:?}");
        assert_eq!(tokenizer.decode(ids).unwrap(), text.as_bytes());
    }
    // A part of a character.
    assert_eq!(tokenizer.decode(&[6, 4]).unwrap(), "ab\u{fffd}".as_bytes());
    // Ids need not follow one another.
    let gap = with(words(), "/model/vocab", json!({ "a": 0, "b": 20 }));
    assert_eq!(self::tokenizer(&gap).vocabulary(), 21);
}

#[test]
fn a_checkpoint_has_all_of_it() {
    let known = tokenizer(&pairs());
    let kept = serde_json::to_string(&known).unwrap();
    let read: Tokenizer = serde_json::from_str(&kept).unwrap();
    assert_eq!(read, known);
    assert_eq!(serde_json::to_string(&read).unwrap(), kept);
    assert_eq!(read.encoder().encode("ab é").unwrap(), known.encoder().encode("ab é").unwrap());
    let damaged = serde_json::from_str::<Tokenizer>(&kept.replace("merges", "merged")).unwrap_err().to_string();
    assert!(damaged.contains("its tokenizer cannot be used"), "{damaged}");
}

#[test]
fn what_is_no_tokenizer_is_refused_and_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    let says = |text: &[u8], words: &[&str]| {
        std::fs::write(&path, text).unwrap();
        let message = Json::open(&path).unwrap_err().to_string();
        assert!(message.contains(path.to_str().unwrap()), "{message}");
        words.iter().for_each(|word| assert!(message.contains(word), "{message:?} does not say {word:?}"));
    };
    let of = |json: Value| json.to_string();
    says(b"", &["EOF", "give a tokenizer.json"]);
    says(b"a book", &["line 1 column 1"]);
    says(b"{\"a\": 1}", &["missing field `model`"]);
    says(b"{\"model\": 1}", &["is no tokenizer"]);
    says(b"\xff", &["UTF-8"]);
    says(of(with(pairs(), "/version", json!("7.0"))).as_bytes(), &["'7.0'"]);
    says(of(with(pairs(), "/model/type", json!("Other"))).as_bytes(), &["is no tokenizer"]);
    says(of(with(pairs(), "/model/merges", json!([["a", "z"]]))).as_bytes(), &["`z`"]);
    says(of(with(pairs(), "/model/dropout", json!(0.1))).as_bytes(), &["at random", "`dropout`"]);
    says(of(with(words(), "/model/vocab", json!({ "a": 1, "b": 1 }))).as_bytes(), &["two of its tokens have the id 1"]);
    says(of(with(words(), "/model/vocab", json!({}))).as_bytes(), &["end at 0"]);
    says(of(with(words(), "/model/vocab", json!({ "a": 1 << 24 }))).as_bytes(), &["end at 16777217"]);
    // Ids that overflow in the crate.
    let last = json!({ "id": 7, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
                       "normalized": false, "special": true });
    let overflow = with(words(), "/model/vocab", json!({ "a": u32::MAX, "b": 0 }));
    says(of(with(overflow, "/added_tokens", json!([last]))).as_bytes(), &["is no tokenizer"]);
    says(&vec![b' '; MOST_BYTES as usize + 1], &["more than 50331648 bytes"]);
}

#[test]
fn texts_that_a_tokenizer_fails_at_are_errors() {
    let says = |json: &Value, text: &str, word: &str| {
        let message = tokenizer(json).encoder().encode(text).unwrap_err().to_string();
        assert!(message.contains("the tokenizer has no tokens for") && message.contains(word), "{message}");
    };
    assert_eq!(tokenizer(&words()).encoder().encode("b a").unwrap(), [1, 0]);
    says(&words(), "a c", "[UNK]");
    // The crate panics at both.
    says(&with(words(), "/pre_tokenizer", json!({ "type": "FixedLength", "length": 0 })), "a", "damaged");
    let charsmap = json!({ "type": "Precompiled", "precompiled_charsmap": "AAAAAA==" });
    says(&with(words(), "/normalizer", charsmap), "a", "damaged");
}

#[test]
fn a_models_tokenizer_needs_no_file_and_no_other_takes_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().to_str().unwrap();
    let file = job::Tokenizer::File { path: "tokenizer.json".into() };
    let (known, other) = (tokenizer(&pairs()), Tokenizer::Bytes);
    let wanted =
        |spec: &job::Tokenizer, model: Option<&Tokenizer>| match Wanted::new(&Files::default(), base, spec, model) {
            Ok(wanted) => Ok(wanted.learn(["é"].into_iter())),
            Err(error) => Err(error.to_string()),
        };
    assert!(wanted(&file, None).unwrap_err().contains("there is no file `tokenizer.json`"));
    assert_eq!(wanted(&file, Some(&known)), Ok(known.clone()));
    let write = |json: Value| std::fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
    write(pairs());
    assert_eq!(wanted(&file, None), Ok(known.clone()));
    assert_eq!(wanted(&file, Some(&known)), Ok(known.clone()));
    let refused = |spec: &job::Tokenizer, model: &Tokenizer| {
        let message = wanted(spec, Some(model)).unwrap_err();
        assert!(message.contains("a tokenizer that is not the model's"), "{message}");
    };
    refused(&file, &other);
    refused(&job::Tokenizer::Bytes, &known);
    write(words());
    refused(&file, &known);
    refused(&job::Tokenizer::Characters, &other);
    assert_eq!(wanted(&job::Tokenizer::Bytes, Some(&other)), Ok(other));
    let spec = |ngrams, buckets| job::Tokenizer::Words { most: 9, ngrams, buckets };
    let words = |ngrams, buckets| Tokenizer::Words { words: vec!["a".into()], ngrams, buckets };
    refused(&spec(2, 7), &words(2, 8));
    refused(&spec(1, 7), &words(2, 7));
    for (ngrams, buckets) in [(2, 8), (1, 0)] {
        let known = words(ngrams, buckets);
        assert_eq!(wanted(&spec(ngrams, 8), Some(&known)), Ok(known));
    }
}

proptest! {
    #[test]
    fn pieces_have_the_tokens_of_the_whole(text in "[ab é\n]{0,60}", least in 1usize..20) {
        let json = Json::new(&pairs().to_string()).unwrap();
        let all: Vec<&str> = pieces(&text, least).collect();
        prop_assert_eq!(all.concat(), &text[..]);
        prop_assert!(all.iter().all(|piece| piece.len() >= least || all.last() == Some(piece)));
        // They are no longer than they must be.
        prop_assert!(all.iter().all(|piece| piece.rfind("a\na").is_none_or(|at| at + 2 < least)));
        let tokens: Vec<u32> = all.iter().flat_map(|piece| json.encode(piece).unwrap()).collect();
        prop_assert_eq!(tokens, json.encode(&text).unwrap());
    }

    #[test]
    fn damaged_files_and_any_text_never_panic(at in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<bool>(), text in any::<String>()) {
        for json in [pairs(), words()] {
            let mut bytes = json.to_string().into_bytes();
            let at = at.index(bytes.len());
            if cut { bytes.truncate(at) } else { bytes[at] = byte }
            if let Ok(json) = Json::new(&String::from_utf8_lossy(&bytes))
                && let Ok(tokens) = json.encode(&text)
            {
                prop_assert!(tokens.iter().all(|&token| (token as usize) < json.vocabulary()));
                let _ = json.decode(&tokens);
            }
        }
    }
}
