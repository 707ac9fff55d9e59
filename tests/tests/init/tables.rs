//! Tables of one's own, from their columns to predictions.

use super::*;
use std::process::Command;
use unisono_tests::program;

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
