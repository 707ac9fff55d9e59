//! From data alone to a trained model: `init` writes a job that trains, whatever it is pointed at, or says why not and writes nothing.

use flate2::{Compression, Crc, write::ZlibEncoder};
use serde_json::Value;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use unisono_tests::{program, run, summary};

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into()
}

fn put(dir: &Path, name: &str, content: impl AsRef<[u8]>) {
    let path = dir.join(name);
    std::fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
    std::fs::write(path, content).expect("written");
}

/// What `init` says of DATA, and the job that it writes.
fn init(dir: &Path, args: &[&str]) -> (String, String) {
    let out = run(dir, &[&["init"], args].concat());
    assert!(out.status.success(), "{args:?}: {}", text(&out.stderr));
    let job = std::fs::read_to_string(dir.join("job.toml")).expect("a job");
    for line in job.lines() {
        assert!(line.chars().count() <= 130, "{line}");
    }
    (text(&out.stdout), job)
}

/// Trains what was written, and gives a metric of the test.
fn trained(dir: &Path, metric: &str, more: &[&str]) -> f64 {
    let done = summary(&run(dir, &[&["local", "job.toml", "--quiet", "--json", "--workers", "2"], more].concat()));
    assert_eq!(done["status"], "done", "{done}");
    done["eval"][metric].as_f64().unwrap_or_else(|| panic!("no {metric}: {done}"))
}

/// Numbers in 0..1 that look like chance, and are the same in every run.
fn chance(i: u64, what: u64) -> f64 {
    let mixed = (i * 1000 + what + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 11) as f64 / (1u64 << 53) as f64
}

/// Flowers of three kinds by their sizes, sorted by kind as such files are.
fn flowers() -> String {
    let row = |i: u64| {
        let kind = (i / 50) as usize;
        let size = |what| [1.0, 4.0, 6.0][kind] + 2.0 * chance(i, what);
        format!(
            "{:.1},{:.1},{:.1},{}\n",
            size(0),
            size(1),
            9.0 * chance(i, 2),
            ["setosa", "versicolor", "virginica"][kind]
        )
    };
    format!("length,width,weight,species\n{}", (0..150).map(row).collect::<String>())
}

#[test]
fn a_table_of_ones_own_is_three_commands_from_predictions() {
    let dir = tempfile::tempdir().expect("a folder");
    put(dir.path(), "flowers.csv", flowers());
    let (says, job) = init(dir.path(), &["flowers.csv"]);
    for words in [
        "150 rows and 4 columns",
        "species (the last column), one of 3 classes: setosa (50), versicolor (50), virginica (50)",
        "a fifth, held out",
        "mlp",
    ] {
        assert!(says.contains(words), "{words}: {says}");
    }
    assert!(job.contains("train = \"flowers.csv\"") && job.contains("\n# What is predicted"), "{job}");
    assert!(trained(dir.path(), "accuracy", &[]) > 0.8);
    // What it says comes next is what comes next.
    let next = |command: &str| says.lines().find(|line| line.starts_with(command)).expect("it is said").to_string();
    assert_eq!(next("unisono local"), "unisono local job.toml");
    put(dir.path(), "NEW.csv", "width,weight,length,note\n1.5,4,1.6,a\n7.2,4,7.1,b\n");
    let words: Vec<String> =
        next("unisono predict").split(" #").next().expect("a command").split_whitespace().map(String::from).collect();
    let said = run(dir.path(), &words.iter().skip(1).map(String::as_str).collect::<Vec<_>>());
    let said = text(&said.stdout);
    let lines: Vec<&str> = said.lines().collect();
    assert!(lines.len() == 3 && lines[1].contains("a,setosa,") && lines[2].contains("b,virginica,"), "{said}");
}

/// A class that comes once may be a slip.
#[test]
fn a_class_that_comes_once_is_named() {
    let dir = tempfile::tempdir().expect("a folder");
    put(dir.path(), "flowers.csv", flowers());
    let (says, _) = init(dir.path(), &["flowers.csv"]);
    assert!(!says.contains("misspelt?"), "{says}");
    put(dir.path(), "slip.csv", flowers() + "1,1,1,virginia\n");
    let (says, _) = init(dir.path(), &["slip.csv", "--out", "slip.toml"]);
    assert!(says.contains("one of 4 classes"), "{says}");
    assert!(says.contains("misspelt?    classes of one row each: virginia\n"), "{says}");
    // Numbers that are rare are no slips.
    put(
        dir.path(),
        "rare.csv",
        (flowers() + "1,1,1,7\n").replace("setosa", "1").replace("versicolor", "2").replace("virginica", "3"),
    );
    let (says, _) = init(dir.path(), &["rare.csv", "--out", "rare.toml"]);
    assert!(says.contains("one of 4 classes") && !says.contains("misspelt?"), "{says}");
}

/// What is between the cells of the training data is between those of new rows, and of the answers; commas are understood as well.
#[test]
fn predictions_take_what_is_between_the_cells_of_the_training_data() {
    let dir = tempfile::tempdir().expect("a folder");
    put(dir.path(), "flowers.csv", flowers().replace(',', ";"));
    let (_, job) = init(dir.path(), &["flowers.csv"]);
    assert!(job.contains("separator = \";\""), "{job}");
    trained(dir.path(), "accuracy", &[]);
    let rows = "width,weight,length,note\n1.5,4,1.6,\"a, b\"\n";
    put(dir.path(), "same.csv", rows.replace("a, b", "a; b").replace(',', ";"));
    put(dir.path(), "commas.csv", rows);
    for (file, want) in [("same.csv", "1.5;4;1.6;\"a; b\";setosa;"), ("commas.csv", "1.5,4,1.6,\"a, b\",setosa,")] {
        let out = run(dir.path(), &["predict", "runs/flowers", file]);
        assert!(text(&out.stdout).lines().nth(1).is_some_and(|line| line.starts_with(want)), "{out:?}");
    }
}

/// One cell makes of a column of numbers no categories, nor of measurements classes.
#[test]
fn a_text_among_numbers_is_a_mistake() {
    let dir = tempfile::tempdir().expect("a folder");
    // The rows' 3rd and 5th.
    let mistakes = |line: (usize, &str)| match line.0 {
        3 => line.1.replacen(",2024", ",x2024", 1).replace(",new,", ",new,about "),
        5 => {
            let mut cells: Vec<&str> = line.1.split(',').collect();
            cells[3] = "4O";
            cells.join(",")
        }
        _ => line.1.into(),
    };
    let table: Vec<String> = houses().replace("\"old, but fine\"", "new").lines().enumerate().map(mistakes).collect();
    put(dir.path(), "houses.csv", table.join("\n"));
    let (says, job) = init(dir.path(), &["houses.csv"]);
    for words in [
        "Price (the last column), a number",
        "Rooms, Area",
        "Sold (dates",
        "`Area` has \"4O\" among",
        "`Price` has \"about ",
    ] {
        assert!(says.contains(words), "{words}: {says}");
    }
    assert!(job.contains("task = \"regression\"") && job.contains("on_error = \"skip\""), "{job}");
    let done = summary(&run(dir.path(), &["local", "job.toml", "--quiet", "--json"]));
    assert_eq!(done["skipped"], 2, "{done}");
}

/// A model is tested on another file as it would predict its rows: with the means and categories of what it was trained on.
#[test]
fn a_model_is_tested_on_another_file() {
    let dir = tempfile::tempdir().expect("a folder");
    put(dir.path(), "houses.csv", houses());
    init(dir.path(), &["houses.csv"]);
    trained(dir.path(), "rmse", &["--set", "train.epochs=5"]);
    let rows: Vec<String> =
        houses().lines().enumerate().filter(|(i, _)| i % 7 == 0).map(|(_, row)| row.into()).collect();
    put(dir.path(), "other.csv", rows.join("\n"));
    let eval = run(dir.path(), &["eval", "runs/houses", "job.toml", "--set", "data.test=other.csv", "--json"]);
    let eval = summary(&eval);
    let said = text(&run(dir.path(), &["predict", "runs/houses", "other.csv"]).stdout);
    let pairs = said.lines().skip(1).map(|row| {
        let mut cells = row.rsplit(',').map(|cell| cell.parse::<f64>().expect("a number"));
        (cells.next().expect("predicted"), cells.next().expect("the price"))
    });
    let pairs: Vec<(f64, f64)> = pairs.collect();
    let n = pairs.len() as f64;
    let mean = pairs.iter().map(|(_, price)| price / n).sum::<f64>();
    let wrong: f64 = pairs.iter().map(|(predicted, price)| (predicted - price).powi(2)).sum();
    let apart: f64 = pairs.iter().map(|(_, price)| (price - mean).powi(2)).sum();
    let rmse = (wrong / n).sqrt();
    let got = eval["eval"]["rmse"].as_f64().expect("a metric");
    assert_eq!(eval["samples"], pairs.len(), "{eval}");
    assert!((got / rmse - 1.0).abs() < 1e-4, "{got} and {rmse}");
    let r2 = eval["eval"]["r2"].as_f64().expect("the share that is explained");
    assert!((r2 - (1.0 - wrong / apart)).abs() < 1e-4 && eval["eval"]["mae"].as_f64() < Some(got), "{eval}");
}

/// A value that no row of the training data had is as good as none, and is not passed over in silence.
#[test]
fn values_that_training_did_not_have_are_named() {
    let dir = tempfile::tempdir().expect("a folder");
    put(dir.path(), "houses.csv", houses());
    init(dir.path(), &["houses.csv"]);
    trained(dir.path(), "rmse", &["--set", "train.epochs=1"]);
    put(dir.path(), "NEW.csv", "Zone,Rooms,Area\ncastle,3,90\nnew,3,90\nNA,3,90\nruin,3,90\n");
    let out = run(dir.path(), &["predict", "runs/houses", "NEW.csv"]);
    let (said, warned) = (text(&out.stdout), text(&out.stderr));
    let prices: Vec<&str> = said.lines().skip(1).map(|row| row.rsplit(',').next().expect("a price")).collect();
    assert!(prices.len() == 4 && prices[0] == prices[2] && prices[0] == prices[3] && prices[0] != prices[1], "{said}");
    assert!(warned.contains("2 rows have a value in `Zone`") && warned.contains("\"castle\""), "{warned}");
    put(dir.path(), "NEW.csv", "Zone,Rooms,Area\nnew,3,90\nNA,3,90\n");
    let out = run(dir.path(), &["predict", "runs/houses", "NEW.csv"]);
    assert_eq!(text(&out.stderr), "", "nothing is new");
    // Without names the first row would be taken for them.
    put(dir.path(), "NEW.csv", "new,3,90\n");
    let out = run(dir.path(), &["predict", "runs/houses", "NEW.csv"]);
    let said = text(&out.stderr);
    assert!(out.status.code() == Some(2) && said.contains("NEW.csv:1: ") && said.contains("is not given"), "{said}");
    // A slip in a name.
    put(dir.path(), "NEW.csv", "Zone,Romos,Area\nnew,3,90\n");
    let said = text(&run(dir.path(), &["predict", "runs/houses", "NEW.csv"]).stderr);
    assert!(said.contains("NEW.csv:1: the column `Rooms`") && said.contains("is it \"Romos\"?"), "{said}");
}

#[test]
fn a_job_in_another_folder_finds_the_same_file() {
    let dir = tempfile::tempdir().expect("a folder");
    // Without names, and with a number before each row.
    let rows: Vec<String> =
        (0..).zip(flowers().lines().skip(1)).map(|(i, row)| format!("{i};{}\n", row.replace(',', ";"))).collect();
    put(dir.path(), "data/flowers.csv", rows.concat());
    put(dir.path(), "jobs/keep", "");
    let out = run(dir.path(), &["init", "data/flowers.csv", "--target", "c3", "--out", "jobs/a.1.toml"]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    assert!(text(&out.stdout).contains("left out     c1 (the rows' own numbers)"), "{}", text(&out.stdout));
    // Named by its own file: another job about the same data is another run.
    assert!(text(&out.stdout).contains("unisono eval runs/a-1\n"), "{}", text(&out.stdout));
    let done = summary(&run(dir.path(), &["local", "jobs/a.1.toml", "--quiet", "--json"]));
    // Values between 1 and 8, whose deviation is 2.
    assert!(done["eval"]["rmse"].as_f64() < Some(1.5), "{done}");
}

#[test]
fn a_file_at_hand_is_meant_and_not_its_namesake() {
    let (dir, data) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
    put(data.path(), "flowers.csv", "x,y\n1,2\n");
    put(data.path(), "other.csv", flowers());
    put(dir.path(), "flowers.csv", flowers());
    let run = |args: &[&str]| {
        let mut command = Command::new(program());
        command.args(args).current_dir(dir.path()).env("UNISONO_DATA", data.path());
        command.output().expect("the program starts")
    };
    for name in ["flowers.csv", "other.csv"] {
        let out = run(&["init", name, "--force"]);
        assert!(text(&out.stdout).contains("150 rows and 4 columns"), "{}", text(&out.stderr));
        let done = summary(&run(&["local", "job.toml", "--quiet", "--json", "--set", "train.epochs=1"]));
        assert_eq!(
            (&done["job"], done["samples"].as_u64() > Some(100)),
            (&name[..name.len() - 4].into(), true),
            "{done}"
        );
    }
}

#[test]
fn small_numbers_are_learnt() {
    let dir = tempfile::tempdir().expect("a folder");
    let row = |i: u64| format!("{i},{:.3},{:.6}\n", chance(i, 0), 0.01 * chance(i, 0) + 0.001 * chance(i, 1));
    put(dir.path(), "small.csv", format!(",x,y\n{}", (0..300).map(row).collect::<String>()));
    let (says, _) = init(dir.path(), &["small.csv"]);
    assert!(says.contains("one without a name (the rows' own numbers)"), "{says}");
    // Their deviation is 0.0029.
    assert!(trained(dir.path(), "rmse", &[]) < 0.002);
}

/// Prices of houses, with a number for each row, dates, gaps and words.
fn houses() -> String {
    let row = |i: u64| {
        let (rooms, area) = ((6.0 * chance(i, 0)).ceil(), (200.0 * chance(i, 1)).round());
        let old = chance(i, 2) < 0.3;
        let price = 20_000.0 * rooms + 1500.0 * area + if old { 90_000.0 } else { 0.0 } + 9_000.0 * chance(i, 3);
        let area = if i % 19 == 3 { "NA".into() } else { area.to_string() };
        let zone = if old { "\"old, but fine\"" } else { "new" };
        format!("{},2024-0{}-1{},{rooms},{area},{zone},{price:.0}\n", i + 1, 1 + i % 9, i % 9)
    };
    format!("Id,Sold,Rooms,Area,Zone,Price\n{}", (0..600).map(row).collect::<String>())
}

#[test]
fn large_numbers_are_learnt_and_what_says_nothing_is_left_out() {
    let dir = tempfile::tempdir().expect("a folder");
    put(dir.path(), "houses.csv", houses());
    let (says, job) = init(dir.path(), &["houses.csv"]);
    for words in ["Price (the last column), a number", "Rooms, Area", "Id (the rows' own", "Sold (dates"] {
        assert!(says.contains(words), "{words}: {says}");
    }
    for line in [
        "missing = \"NA\"",
        "task = \"regression\"",
        "categorical = [\"Zone\"]",
        "ignore = [\"Id\", \"Sold\"]",
        "loss = \"mse\"",
    ] {
        assert!(job.lines().any(|other| other == line), "{line}: {job}");
    }
    // Their deviation is 100,000; most of what is left is of areas that are missing.
    assert!(trained(dir.path(), "rmse", &[]) < 20_000.0);
    // Without that, it is another model.
    assert!(
        init(dir.path(), &["houses.csv", "--target", "Zone", "--force"]).1.contains("loss = \"binary-cross-entropy\"")
    );
}

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
fn what_cannot_be_learnt_from_is_named_and_nothing_is_written() {
    let dir = tempfile::tempdir().expect("a folder");
    let rows = |of: &dyn Fn(u64) -> String| (0..60).map(of).collect::<String>();
    put(dir.path(), "empty.csv", "\n \n");
    put(dir.path(), "one.csv", format!("x\n{}", rows(&|i| format!("{i}\n"))));
    put(dir.path(), "same.csv", format!("x,kind\n{}", rows(&|i| format!("{},yes\n", i % 7))));
    put(dir.path(), "few.csv", "x,kind\n1,yes\n2,no\n");
    put(dir.path(), "names.csv", format!("x,who\n{}", rows(&|i| format!("{},person {i}\n", i % 7))));
    put(dir.path(), "ids.csv", format!("id,day,kind\n{}", rows(&|i| format!("{i},2024-01-1{},{}\n", i % 9, i % 2))));
    put(dir.path(), "twice.csv", format!("x,x,kind\n{}", rows(&|i| format!("{},{},{}\n", i % 7, i % 5, i % 2))));
    put(dir.path(), "bytes.dat", [0xffu8, 0, 1, 2]);
    put(dir.path(), "list.json", "[{\"x\": 1}, {\"x\": 2}]");
    put(dir.path(), "pictures/a/x.png", "no picture");
    put(dir.path(), "two/a.csv", "x,y\n1,2\n");
    put(dir.path(), "two/b.csv", "x,y\n1,2\n");
    put(dir.path(), "short.txt", "To be, or not\n");
    put(dir.path(), "same.svm", rows(&|i| format!("1 {}:1\n", i % 7)));
    put(dir.path(), "pictures/b/y.png", "no picture");
    put(dir.path(), "good.csv", flowers());
    for (args, words) in [
        (&["none.csv"][..], &["there is no none.csv"][..]),
        (&["empty.csv"], &["empty.csv is empty"]),
        (&["one.csv"], &["one column"]),
        (&["same.csv"], &["`kind`", "`yes` in all rows", "--target", "x, kind"]),
        (&["few.csv"], &["2 rows", "20 at least"]),
        (&["names.csv"], &["`who`", "60 different texts", "--target"]),
        (&["ids.csv"], &["no column to learn `kind` from", "`id`: the rows' own numbers", "`day`: dates"]),
        (&["twice.csv"], &["nothing was written", "two columns `x`"]),
        (&["bytes.dat"], &["bytes.dat", "UTF-8"]),
        (&["list.json"], &["list.json", "an object on each line"]),
        (&["pictures"], &["x.png cannot be read as a picture"]),
        (&["two"], &["several files", "a.csv, b.csv"]),
        (&["short.txt"], &["nothing was written", "short.txt", "use more text"]),
        (&["same.svm"], &["nothing was written", "all samples to train on are of the class `1`"]),
        (&["good.csv", "--target", "speces"], &["no column `speces`", "length, width, weight, species"]),
        (&["short.txt", "--target", "x"], &["--target x is for tables"]),
        (&["good.csv", "--out", "nowhere/job.toml"], &["there is no folder nowhere"]),
    ] {
        let out = run(dir.path(), &[&["init"], args].concat());
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{args:?}: {said}");
        assert!(words.iter().all(|word| said.contains(word)) && !said.contains("panicked"), "{args:?}: {said}");
        assert!(!dir.path().join("job.toml").exists(), "{args:?}");
    }
    put(dir.path(), "job.toml", "mine");
    let out = run(dir.path(), &["init", "good.csv"]);
    assert!(out.status.code() == Some(2) && text(&out.stderr).contains("job.toml exists; add --force"), "{out:?}");
    let out = run(dir.path(), &["init", "godo.csv"]);
    assert!(out.status.code() == Some(2) && text(&out.stderr).contains("there is no godo.csv"), "{out:?}");
    // A failure keeps it, with --force too.
    assert_eq!(run(dir.path(), &["init", "same.csv", "--force"]).status.code(), Some(2));
    assert_eq!(std::fs::read(dir.path().join("job.toml")).expect("there"), b"mine");
    assert!(init(dir.path(), &["good.csv", "--force"]).1.contains("good.csv"));
}

#[test]
fn rows_and_test_files_that_cannot_be_used_are_told_and_left_out() {
    let dir = tempfile::tempdir().expect("a folder");
    // A quote that nothing closes, in a file with tabs; a line that is too short; one without a class; a class that is there once.
    let row = |i: u64| match i {
        40 => "1\n".to_string(),
        50 => "1\t\"b\t\n".into(),
        60 => "1\tb\tmaybe\n".into(),
        _ => format!("{:.2}\t\"{}\t{}\n", chance(i, 0), i % 3, if chance(i, 0) < 0.5 { "no" } else { "yes" }),
    };
    put(dir.path(), "train.tsv", format!("x\tb\tkind\n{}", (0..200).map(row).collect::<String>()));
    put(dir.path(), "test.tsv", "x\tb\n1\t2\n");
    let (says, job) = init(dir.path(), &["train.tsv"]);
    for words in [
        "1, left out; the first:",
        "train.tsv:42",
        "1, left out: no `kind`",
        "a fifth, held out; ",
        "test.tsv cannot be one",
    ] {
        assert!(says.contains(words), "{words}: {says}");
    }
    assert!(job.contains("quoting = false") && job.contains("on_error = \"skip\""), "{job}");
    assert!(trained(dir.path(), "accuracy", &[]) > 0.8);
    put(dir.path(), "test.tsv", "x\tb\tkind\n0.1\t\"1\tno\n0.9\t\"1\tyes\n");
    assert!(init(dir.path(), &["train.tsv", "--force"]).1.contains("test = \"test.tsv\""));
    assert!(trained(dir.path(), "accuracy", &[]) > 0.8);
}

/// What comes of a data set that is not in the repository: `init` with a path below UNISONO_DATA, and some steps.
fn known(data: &str, metric: &str, steps: u64) -> Option<(String, f64)> {
    if std::env::var_os("UNISONO_DATA").is_none() {
        eprintln!("skipped: set UNISONO_DATA to the folder of the data sets to run {data}");
        return None;
    }
    let dir = tempfile::tempdir().expect("a folder");
    let (_, job) = init(dir.path(), &[data]);
    Some((job, trained(dir.path(), metric, &["--set", &format!("train.steps={steps}")])))
}

#[test]
fn census_messages_digits_and_plays_are_learnt() {
    let has = |job: &str, lines: &[&str]| lines.iter().for_each(|line| assert!(job.contains(line), "{line}: {job}"));
    if let Some((job, auc)) = known("adult", "auc", 500) {
        has(
            &job,
            &[
                "train = \"adult/adult-train.csv\"\ntest = \"adult/adult-test.csv\"",
                "target = \"c15\"",
                "categorical = [\"c2\", \"c4\"",
            ],
        );
        assert!(auc > 0.88, "{auc}");
    }
    if let Some((job, f1)) = known("sms-spam/sms.tsv", "f1", 300) {
        has(&job, &["separator = \"\\t\"", "text = \"sentence\"", "target = \"label\"", "kind = \"text-classifier\""]);
        assert!(f1 > 0.95, "{f1}");
    }
    if let Some((job, accuracy)) = known("mnist", "accuracy", 30) {
        has(&job, &["format = \"idx\"", "t10k-labels", "op = \"conv2d\"", "units = 10"]);
        assert!(accuracy > 0.6, "{accuracy}");
    }
    if let Some((job, perplexity)) = known("tinyshakespeare/input.txt", "perplexity", 60) {
        has(&job, &["format = \"text\"", "tokenizer = \"characters\"", "holdout = 0.1", "kind = \"gpt\""]);
        // Of 65 characters; by how often each comes, it is 28.
        assert!(perplexity < 20.0, "{perplexity}");
    }
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
