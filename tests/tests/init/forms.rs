//! Each form that data comes in is known.

use super::*;
use flate2::{Compression, Crc, write::ZlibEncoder};
use serde_json::Value;
use std::io::Write;

/// Who buys what: more users and items than are one-hot encoded.
fn shop(line: impl Fn(u64, u64, f64, bool) -> String) -> String {
    let row = |i: u64| {
        let (user, item, price) = ((600.0 * chance(i, 0)) as u64, (90.0 * chance(i, 1)) as u64, chance(i, 2));
        line(user, item, price, chance(i, 3) < 0.1 + 0.4 * (user % 2 + item % 2) as f64)
    };
    (0..6000).map(row).collect()
}

#[test]
fn many_categories_are_rows_of_sparse_tables() {
    let dir = tempfile::tempdir().expect("a folder");
    let rows = shop(|user, item, price, bought| format!("{user}\tsku-{item}\t{price:.3}\t{bought}\n"));
    put(dir.path(), "shop.tsv", format!("user_id\titem\tprice\tbought\n{rows}"));
    let (_, job) = init(dir.path(), &["shop.tsv"]);
    assert!(job.contains("ids = [\"user_id\", \"item\"]") && job.contains("kind = \"wide-deep\""), "{job}");
    assert!(trained(dir.path(), "auc", &[]) > 0.6);
}

#[test]
fn other_forms_of_tables_are_known() {
    let dir = tempfile::tempdir().expect("a folder");
    let row = |i: u64| {
        let (x, kind) = (chance(i, 0), ["a", "b"][(i % 2) as usize]);
        format!("{{\"label\": {}, \"x\": {x}, \"kind\": {kind:?}, \"tags\": [1, 2]}}\n", (x < 0.5) ^ (kind == "a"))
    };
    put(dir.path(), "rows.jsonl", (0..400).map(row).collect::<String>());
    let (says, job) = init(dir.path(), &["rows.jsonl"]);
    assert!(says.contains("label (by its name)") && says.contains("NEW.jsonl"), "{says}");
    assert!(job.contains("format = \"json-lines\"") && job.contains("ignore = [\"tags\"]"), "{job}");
    assert!(trained(dir.path(), "accuracy", &[]) > 0.8);

    put(dir.path(), "rows.parquet", parquet());
    let (_, job) = init(dir.path(), &["rows.parquet", "--force"]);
    assert!(job.contains("format = \"parquet\"") && job.contains("ignore = [\"day\"]"), "{job}");
    assert!(trained(dir.path(), "accuracy", &[]) > 0.8);

    let row = |i: u64| {
        let features: Vec<u64> = (0..4).map(|k| 15 * k + 1 + (15.0 * chance(i, k)) as u64).collect();
        let label = if features.iter().filter(|f| **f % 3 == 0).count() > 1 { "+1" } else { "-1" };
        format!("{label} {}\n", features.iter().map(|f| format!("{f}:1")).collect::<Vec<_>>().join(" "))
    };
    put(dir.path(), "lines.txt", (0..600).map(row).collect::<String>());
    assert!(init(dir.path(), &["lines.txt", "--force"]).1.contains("format = \"libsvm\""));
    assert!(trained(dir.path(), "auc", &[]) > 0.8);
}

/// A number, a day and a class, which is whether the number is above 0.
fn parquet() -> Vec<u8> {
    use parquet::data_type::{ByteArray, ByteArrayType, DoubleType, Int32Type};
    let schema = "message rows { required double x; required int32 day (date); required binary kind (utf8); }";
    let schema = parquet::schema::parser::parse_message_type(schema).expect("a schema").into();
    let mut writer =
        parquet::file::writer::SerializedFileWriter::new(Vec::new(), schema, Default::default()).expect("a file");
    let x: Vec<f64> = (0..300).map(|i| chance(i, 0) - 0.5).collect();
    let kinds: Vec<ByteArray> = x.iter().map(|x| ByteArray::from(if *x > 0.0 { "high" } else { "low" })).collect();
    let mut group = writer.next_row_group().expect("a group");
    macro_rules! column {
        ($kind:ty, $values:expr) => {{
            let mut column = group.next_column().expect("a column").expect("one more");
            column.typed::<$kind>().write_batch($values, None, None).expect("written");
            column.close().expect("written");
        }};
    }
    column!(DoubleType, &x);
    column!(Int32Type, &(0..300).collect::<Vec<i32>>());
    column!(ByteArrayType, &kinds);
    group.close().expect("written");
    writer.into_inner().expect("written")
}

#[test]
fn ratings_are_known_by_names_by_colons_and_by_their_numbers() {
    let dir = tempfile::tempdir().expect("a folder");
    let lines = |between: &str| -> String {
        let row = |i: u64| {
            let (user, item) = ((80.0 * chance(i, 0)) as u64, (50.0 * chance(i, 1)) as u64);
            let stars = if user % 2 == item % 2 { 5 } else { 1 };
            [user, item, stars, 880_000_000 + i].map(|n| n.to_string()).join(between) + "\n"
        };
        (0..3000).map(row).collect()
    };
    put(dir.path(), "ml/ratings.csv", format!("userId,movieId,rating,timestamp\n{}", lines(",")));
    put(dir.path(), "ml/movies.csv", "movieId,title\n1,One\n2,Two\n");
    put(dir.path(), "u.data", lines("\t"));
    put(dir.path(), "ratings.dat", lines("::"));
    let of = |data: &str| {
        let (_, job) = init(dir.path(), &[data, "--force"]);
        assert!(job.contains("format = \"ratings\"") && job.contains("\"matrix-factorization\""), "{job}");
        trained(dir.path(), "rmse", &[])
    };
    // Whoever says 3 is wrong by 2.
    let error = of("ml");
    assert!(error < 1.5, "{error}");
    assert_eq!((of("u.data"), of("ratings.dat")), (error, error));
    // It is a table, too.
    assert!(init(dir.path(), &["ml", "--target", "rating", "--force"]).1.contains("format = \"csv\""));
}

/// A PNG of grey pixels.
fn png(size: u32, pixels: &[u8]) -> Vec<u8> {
    let mut lines = ZlibEncoder::new(Vec::new(), Compression::fast());
    for line in pixels.chunks(size as usize) {
        lines.write_all(&[&[0], line].concat()).expect("packed");
    }
    let header = [&size.to_be_bytes()[..], &size.to_be_bytes(), &[8, 0, 0, 0, 0]].concat();
    let mut file = b"\x89PNG\r\n\x1a\n".to_vec();
    for (kind, body) in [(b"IHDR", header), (b"IDAT", lines.finish().expect("packed")), (b"IEND", Vec::new())] {
        let mut crc = Crc::new();
        let content = [&kind[..], &body].concat();
        crc.update(&content);
        file.extend([&(body.len() as u32).to_be_bytes()[..], &content, &crc.sum().to_be_bytes()].concat());
    }
    file
}

/// Ten pixels square, of which the upper or the lower half is brighter.
fn picture(i: u64, class: usize) -> Vec<u8> {
    let pixel = |p: u64| (100.0 * chance(i, p)) as u8 + if (p < 50) == (class == 0) { 120 } else { 0 };
    (0..100).map(pixel).collect()
}

#[test]
fn pictures_are_known_by_their_folders() {
    let dir = tempfile::tempdir().expect("a folder");
    for (class, name) in ["sky", "sea"].into_iter().enumerate() {
        for i in 0..60 {
            let png = png(10, &picture(2 * i + class as u64, class));
            put(dir.path(), &format!("alone/{name}/{i}.png"), &png);
            put(dir.path(), &format!("both/{}/{name}/{i}.png", if i < 40 { "train" } else { "test" }), &png);
        }
    }
    let (_, job) = init(dir.path(), &["alone"]);
    assert!(job.contains("size = [10, 10]\nchannels = 1") && job.contains("holdout = 0.2"), "{job}");
    assert!(trained(dir.path(), "accuracy", &["--set", "train.steps=60"]) > 0.8);
    let (_, job) = init(dir.path(), &["both", "--force"]);
    assert!(job.contains("train = \"both/train\"\ntest = \"both/test\"\n"), "{job}");
    assert!(trained(dir.path(), "accuracy", &["--set", "train.steps=60"]) > 0.8);
}

#[test]
fn cifars_files_are_known() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = |from: u64| -> Vec<u8> {
        let sample =
            |i: u64| std::iter::once((i % 10) as u8).chain((0..3072).map(move |p| (20 * (i % 10) + p % 20) as u8));
        (from..from + 60).flat_map(sample).collect()
    };
    for (name, from) in [("data_batch_1.bin", 0), ("data_batch_2.bin", 60), ("test_batch.bin", 120)] {
        put(dir.path(), &format!("cifar/{name}"), file(from));
    }
    let (_, job) = init(dir.path(), &["cifar"]);
    assert!(job.contains("\"cifar/data_batch_2.bin\"]\ntest = [\"cifar/test_batch.bin\"]\nclasses = 10"), "{job}");
    assert!(trained(dir.path(), "accuracy", &["--set", "train.steps=40"]) > 0.2);
}

#[test]
fn a_plain_text_is_learnt_to_go_on() {
    let dir = tempfile::tempdir().expect("a folder");
    let line = |i: u64| {
        format!(
            "The {} {}, and so it is.\n",
            ["cat", "dog", "bird"][(i * 7 % 3) as usize],
            ["sings", "runs"][(i % 2) as usize]
        )
    };
    put(dir.path(), "book.txt", (0..300).map(line).collect::<String>());
    let (says, job) = init(dir.path(), &["book.txt"]);
    assert!(says.contains("plain text") && job.contains("kind = \"gpt\""), "{says}");
    // Of 24 characters.
    assert!(trained(dir.path(), "perplexity", &["--set", "train.steps=100"]) < 8.0);
}

#[test]
fn a_test_set_that_is_not_there_is_said() {
    let dir = tempfile::tempdir().expect("a folder");
    let idx = |magic: u32, sizes: &[u32], bytes: Vec<u8>| -> Vec<u8> {
        std::iter::once(&magic).chain(sizes).flat_map(|n| n.to_be_bytes()).chain(bytes).collect()
    };
    put(
        dir.path(),
        "mine/train-images.idx3",
        idx(0x803, &[80, 10, 10], (0..80).flat_map(|i| picture(i, i as usize % 2)).collect()),
    );
    put(dir.path(), "mine/train-labels.idx1", idx(0x801, &[80], (0..80).map(|i| i % 2).collect()));
    let (says, _) = init(dir.path(), &["mine"]);
    assert!(says.contains("nothing is evaluated"), "{says}");
    let done: Value = summary(&run(dir.path(), &["local", "job.toml", "--quiet", "--json", "--set", "train.steps=60"]));
    assert!(done["train_loss"].as_f64() < Some(0.5) && done.get("eval").is_none(), "{done}");
}
