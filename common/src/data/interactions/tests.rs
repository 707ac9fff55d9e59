use super::*;
use crate::data::partition::Partitions;
use crate::data::{Batch, Draw, Opened, Prepared};
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::path::Path;

fn spec(folder: &Path) -> RatingFiles {
    RatingFiles {
        base: folder.display().to_string(),
        train: "train".into(),
        test: None,
        holdout: None,
        columns: None,
        header: false,
        separator: Separator::Text(",".into()),
        implicit: None,
    }
}

fn implicit() -> Implicit {
    Implicit { negatives: 3, threshold: None, eval_negatives: None, k: 10 }
}

/// What a job reads of these files; the test file may be none.
fn read_files(
    spec: impl Fn(RatingFiles) -> RatingFiles,
    train: impl AsRef<[u8]>,
    test: Option<&str>,
) -> Result<Raw, DataError> {
    read_with(spec, train, test, OnError::Stop)
}

fn read_with(
    spec: impl Fn(RatingFiles) -> RatingFiles,
    train: impl AsRef<[u8]>,
    test: Option<&str>,
    on_error: OnError,
) -> Result<Raw, DataError> {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("train"), train).unwrap();
    if let Some(test) = test {
        std::fs::write(folder.path().join("test"), test).unwrap();
    }
    let spec = spec(RatingFiles { test: test.map(|_| "test".into()), ..self::spec(folder.path()) });
    read(&Files::default(), &spec, 7, on_error)
}

fn says<T>(result: Result<T, DataError>, parts: &[&str]) {
    let message = result.map(|_| ()).unwrap_err().to_string();
    assert!(parts.iter().all(|part| message.contains(part)), "{message}");
}

/// Users' names, items' names and ratings of a data set, as the file had them.
fn lines(raw: &Raw, data: &Dataset, users: &[&str]) -> Vec<(String, String, f32)> {
    let user = |id: u64| {
        let same = |name: &&&str| raw.ids[0].id(std::iter::once(**name), "") == Ok(id);
        users.iter().find(same).map(|name| name.to_string()).unwrap_or_default()
    };
    let rating = |row: usize| if let Targets::Value(ratings) = &data.targets { ratings[row] } else { 0.0 };
    let one = |row: usize| {
        let ids = data.ids.of(row);
        let item = if ids[1] == NO_ID { "?".into() } else { raw.ids[1].value(ids[1]) };
        (user(ids[0]), item, rating(row))
    };
    (0..data.samples()).map(one).collect()
}

fn owned(lines: &[(&str, &str, f32)]) -> Vec<(String, String, f32)> {
    lines.iter().map(|(user, item, rating)| (user.to_string(), item.to_string(), *rating)).collect()
}

#[test]
fn separators_headers_and_columns_are_as_the_job_says() {
    let want = owned(&[("u1", "b", 4.0), ("u2", "a", 3.5), ("u1", "c", -1.0)]);
    let text = |text: &str| Separator::Text(text.into());
    let names = |names: &[&str]| Some(names.iter().map(|name| name.to_string()).collect());
    for (separator, columns, header, file) in [
        (text(","), None, false, "u1,b,4\nu2,a,3.5\n\nu1,c,-1\n"),
        (text(","), None, false, "u1, b ,4,100\r\nu2,a,3.5,50\r\nu1,\"c\",-1,1\r\n"),
        (text(","), None, true, "time,item,rating,user\n9,b,4,u1\n9,a,3.5,u2\n9,c,-1,u1\n"),
        (text("::"), None, false, "u1::b::4::978300760\nu2::a::3.5::1\nu1::c::-1::2\n"),
        (text("\t"), None, false, "u1\tb\t4\t100\nu2\ta\t3.5\t50\nu1\tc\t-1\t1"),
        (Separator::Whitespace, None, false, " u1 \t b  4\nu2 a 3.5\nu1  c -1 \n"),
        (text(";"), names(&["rating", "-", "item", "user"]), false, "4;x;b;u1\n3.5;y;a;u2\n-1;;c;u1\n"),
        (text(";"), names(&["item", "rating", "user"]), true, "movieId;stars;userId\nb;4;u1\na;3.5;u2\nc;-1;u1\n"),
    ] {
        let spec = |spec| RatingFiles { separator: separator.clone(), columns: columns.clone(), header, ..spec };
        let raw = read_files(spec, file, None).unwrap();
        assert_eq!(lines(&raw, &raw.train, &["u1", "u2"]), want, "{file}");
        assert_eq!(raw.ids[1].values, ["a", "b", "c"], "{file}");
    }
    // A quoted cell may hold the separator.
    let raw = read_files(|spec| spec, "u1,\"Alien, 1979\",4\nu1,Brazil,5\n", None).unwrap();
    assert_eq!(raw.ids[1].values, ["Alien, 1979", "Brazil"]);
}

#[test]
fn the_last_of_each_user_is_tested_and_the_only_one_is_not() {
    let file = "u1,a,4,30\nu1,b,4,10\nu2,a,1,7\nu3,c,2,5\nu3,b,3,5\nu1,c,1,20\n";
    let last = |spec| RatingFiles { holdout: Some(HeldOut::Last), ..spec };
    let raw = read_files(last, file, None).unwrap();
    let users = ["u1", "u2", "u3"];
    let test = raw.test.as_ref().unwrap();
    // Of one time, the last line.
    assert_eq!(lines(&raw, test, &users), owned(&[("u1", "a", 4.0), ("u3", "b", 3.0)]));
    assert_eq!(raw.train.samples() + test.samples(), 6);
    // The last that reaches the threshold; what does not reach it is no sample, but seen.
    let implicit = Some(Implicit { threshold: Some(2.0), ..implicit() });
    let raw = read_files(|spec| RatingFiles { implicit, ..last(spec) }, file, None).unwrap();
    let users_of = |data: &Dataset| lines(&raw, data, &users).into_iter().map(|(u, i, _)| u + &i).collect::<Vec<_>>();
    assert_eq!(users_of(raw.test.as_ref().unwrap()), ["u1a", "u3b"]);
    assert_eq!(users_of(&raw.train), ["u1b", "u3c"]);
    let Targets::Seen(seen) = &raw.train.targets else { panic!() };
    let of = |user: &str| seen.of(raw.ids[0].id(std::iter::once(user), "").unwrap()).to_vec();
    assert_eq!((of("u1"), of("u2"), of("u3"), of("u4")), (vec![1, 2], vec![0], vec![2], vec![]));
    says(read_files(last, "u1,a,4,3\nu2,a,4,3\n", None), &["no user has two samples"]);
    says(read_files(last, "u1,a,4\nu1,b,4\n", None), &["3 cells", "at least 4", "user, item, rating, time"]);
}

#[test]
fn a_share_is_held_out_by_hash_of_user_and_item() {
    let line = |i: usize| format!("u{},i{},{}\n", i % 40, i * 7 % 50, i % 5);
    let file: String = (0..1000).map(line).collect();
    let share = |spec| RatingFiles { holdout: Some(HeldOut::Share(0.2)), ..spec };
    let raw = read_files(share, &file, None).unwrap();
    let (train, test) = (&raw.train, raw.test.as_ref().unwrap());
    assert!((140..260).contains(&test.samples()) && train.samples() + test.samples() == 1000);
    let pairs = |data: &Dataset| data.ids.values.chunks(2).map(|ids| (ids[0], ids[1])).collect::<BTreeSet<_>>();
    assert!(pairs(train).is_disjoint(&pairs(test)), "equal pairs are on one side");
    says(read_files(|spec| RatingFiles { holdout: Some(HeldOut::Share(1e-9)), ..spec }, &file, None), &["test on"]);
}

#[test]
fn a_test_file_has_the_training_files_users_and_items() {
    let raw = read_files(|spec| spec, "u1,b,4\nu2,a,3\n", Some("u2,b,1\nu9,a,2\nu1,z,3\n")).unwrap();
    let test = raw.test.as_ref().unwrap();
    let want = owned(&[("u2", "b", 1.0), ("u9", "a", 2.0), ("u1", "?", 3.0)]);
    assert_eq!(lines(&raw, test, &["u1", "u2", "u9"]), want);
    let implicit = |spec| RatingFiles { implicit: Some(implicit()), ..spec };
    let ranked = read_files(implicit, "u1,b\nu2,a\n", Some("u2,b\nu9,a\nu1,z\n"));
    says(ranked, &["test:3", "the item `z`", "training file"]);
}

#[test]
fn what_is_wrong_is_named_with_its_line() {
    let explicit = |file: &str, parts: &[&str]| says(read_files(|spec| spec, file, None), parts);
    explicit("", &["holds no samples"]);
    explicit("\n \n", &["holds no samples"]);
    explicit("u1,a,4\nu1,b\n", &["train:2", "2 cells", "3 columns"]);
    explicit("u1::a::4\n", &["train:1", "1 cells", "at least 3", "data.separator"]);
    explicit("u1,a,4,1,2\n", &["train:1", "5 cells", "4 columns"]);
    explicit("user,item,rating\nu1,a,4\n", &["train:1", "`rating`", "data.header"]);
    explicit("u1,a,4\n\nu1,b,five\n", &["train:3", "column `rating`", "`five`", "finite"]);
    explicit("u1,a,4\nu1,b,inf\n", &["train:2", "`inf`"]);
    explicit("u1,a,4\n,b,4\n", &["train:2", "column `user` is empty"]);
    explicit("u1,a,4\nu2, ,4\n", &["train:2", "column `item` is empty"]);
    let header = |spec| RatingFiles { header: true, ..spec };
    says(
        read_files(header, "userId,item,rating\nu1,a,4\n", None),
        &["userId, item, rating", "no `user`", "data.columns"],
    );
    says(read_files(header, "user,item,rating\n", None), &["holds no samples"]);
    let last = |spec| RatingFiles { holdout: Some(HeldOut::Last), ..spec };
    says(read_files(last, "u1,a,4,2020-01-01\n", None), &["train:1", "column `time`", "`2020-01-01`"]);
    let implicit = |spec| RatingFiles { implicit: Some(implicit()), ..spec };
    says(read_files(implicit, "u1,a\nu2,a\nu2,b\n", None), &["the user `u2`", "all 2 items"]);
    let threshold =
        |spec| RatingFiles { implicit: Some(Implicit { threshold: Some(4.5), ..self::implicit() }), ..spec };
    says(read_files(threshold, "u1,a,4\nu2,b,3\n", None), &["train", "data.implicit.threshold = 4.5"]);
    says(read_files(threshold, "u1,a,5\nu2,b,3\n", Some("u1,b,3\n")), &["test", "data.implicit.threshold = 4.5"]);
    says(read_files(threshold, "u1,a\nu2,b\n", None), &["2 cells", "at least 3"]);
}

#[test]
fn all_of_a_user_or_of_an_item_is_held_out() {
    let file: String = (0..200).map(|i| format!("u{},i{},{}\n", i % 23, i * 7 % 31, i % 5)).collect();
    for (of, holdout) in [(0, HeldOut::Users(0.3)), (1, HeldOut::Items(0.3))] {
        let raw = read_files(|spec| RatingFiles { holdout: Some(holdout), ..spec }, &file, None).unwrap();
        let test = raw.test.unwrap();
        let ids = |set: &Dataset| (0..set.samples()).map(|i| set.ids.of(i)[of]).collect::<BTreeSet<u64>>();
        assert!(ids(&raw.train).is_disjoint(&ids(&test)) && raw.train.samples() + test.samples() == 200);
        let other = |set: &Dataset| (0..set.samples()).map(|i| set.ids.of(i)[1 - of]).collect::<BTreeSet<u64>>();
        assert!(!other(&raw.train).is_disjoint(&other(&test)));
    }
}

#[test]
fn times_without_ratings_are_enough_for_the_last_of_implicit_feedback() {
    let columns = Some(["user", "item", "time"].map(String::from).to_vec());
    let spec = |spec| RatingFiles {
        implicit: Some(implicit()),
        holdout: Some(HeldOut::Last),
        columns: columns.clone(),
        ..spec
    };
    let raw = read_files(spec, "u,a,3\nu,b,9\nu,c,5\nv,a,1\nv,c,2\n", None).unwrap();
    assert_eq!((raw.train.samples(), raw.test.map(|test| test.samples())), (3, Some(2)));
}

#[test]
fn who_has_all_items_cannot_be_tested_either() {
    let train = "u,a,5\nv,b,5\nhater,a,1\nhater,b,1\n";
    let spec = |spec| RatingFiles { implicit: Some(Implicit { threshold: Some(4.0), ..implicit() }), ..spec };
    says(read_files(spec, train, Some("hater,a,5\n")), &["test", "`hater`", "all 2 items"]);
    assert!(read_files(spec, train, Some("u,b,5\n")).is_ok());
}

#[test]
fn lines_that_are_left_out_might_as_well_not_be_there() {
    let clean = "u,a,5\nv,b,4\nu,b,1\nv,c,2\n".to_string();
    let test = "u,a,3\nv,c,1\n";
    for implicit in [None, Some(Implicit { threshold: Some(2.0), ..implicit() })] {
        let with = |spec| RatingFiles { implicit, ..spec };
        let want = read_files(with, &clean, Some(test)).unwrap();
        let mut dirty = b"\xff\xfe,a,5\n".to_vec();
        dirty.splice(0..0, b"w\nu,a,5\nw,,5\nw,new\nw,new,good\n".iter().copied());
        dirty.extend_from_slice(clean.split_once('\n').unwrap().1.as_bytes());
        // In a test file an item that nobody knows is one more, where items are ranked.
        let more = format!("u,a,inf\n{test}{}", if implicit.is_some() { "u,new,5\n" } else { "" });
        let count = 6 + usize::from(implicit.is_some());
        let got = read_with(with, &dirty, Some(&more), OnError::Skip { most: count }).unwrap();
        assert_eq!((&got.train, &got.test, &got.ids), (&want.train, &want.test, &want.ids));
        let skipped = got.skipped.unwrap();
        assert_eq!(skipped.samples, count);
        assert!(skipped.first.unwrap().contains("train:1"));
        says(
            read_with(with, &dirty, Some(&more), OnError::Skip { most: count - 1 }),
            &[&format!("{count} of"), "train:1", "train:3: column `item` is empty"],
        );
        says(read_files(with, &dirty[30..], None), &["train:1", "not UTF-8"]);
    }
}

/// Interactions of 12 users with 15 items, for which each user has some to spare.
fn some(seed: u64, implicit: Implicit) -> Opened {
    let key = Key::new(seed, Purpose::Synthetic);
    let line = |i: u64| format!("u{},i{}\n", key.below(2 * i, 12), key.below(2 * i + 1, 8) + key.below(2 * i, 12) % 7);
    let file: String = (0..15).map(|i| format!("rest,i{i}\n")).take(14).chain((0..60).map(line)).collect();
    let raw = read_files(
        |spec| RatingFiles { implicit: Some(implicit), holdout: Some(HeldOut::Share(0.3)), ..spec },
        &(file + "other,i14\n"),
        None,
    );
    raw.unwrap().prepare(true)
}

fn filled(data: &Dataset, prepared: &Prepared, rows: &[usize], draw: Option<Draw<'_>>) -> Batch {
    let mut batch = Batch::empty();
    batch.fill(data, prepared, rows.iter().copied(), draw, false);
    batch
}

proptest! {
    #[test]
    fn candidates_are_items_that_their_user_does_not_have_wherever_the_batch_is_made(
        seed in any::<u64>(), epoch in 0u64..9, partitions in 1u32..4, hashed in any::<bool>(), tested in prop::option::of(1u32..6),
    ) {
        let opened = some(seed, Implicit { eval_negatives: tested, ..implicit() });
        let Opened { train, test, prepared, .. } = &opened;
        prepared.check().unwrap();
        let test = test.as_ref().unwrap();
        for (data, is_test, draw) in [(train, false, Draw::new(seed, epoch, None)), (test, true, Draw::test(seed))] {
            let Ok(parts) = Partitions::new(data.samples(), partitions, hashed.then_some(seed)) else { return Ok(()) };
            let Targets::Seen(seen) = &data.targets else { panic!() };
            let all: Vec<usize> = (0..data.samples()).collect();
            let batch = filled(data, prepared, &all, Some(draw));
            let Targets::Value(targets) = &batch.targets else { panic!() };
            prop_assert_eq!((batch.inputs.len(), batch.ids.len(), targets.len()), (batch.samples, 2 * batch.samples, batch.samples));
            prop_assert_eq!(batch.samples_of(0..batch.samples), data.samples());
            let mut own = Vec::new();
            for (ids, target) in batch.ids.chunks(2).zip(targets) {
                prop_assert!(ids[1] < 15);
                if *target == 1.0 {
                    own.push([ids[0], ids[1]]);
                } else {
                    prop_assert_eq!(own.last().unwrap()[0], ids[0]);
                    prop_assert!(!seen.of(ids[0]).contains(&(ids[1] as u32)) && own.last().unwrap()[1] != ids[1]);
                }
            }
            prop_assert_eq!(own.concat(), data.ids.values.clone(), "each sample comes first among its candidates");
            if !is_test {
                prop_assert_eq!(batch.samples, 4 * data.samples());
            }
            prop_assert!(batch.samples <= data.samples() * prepared.rows_of_a_sample(is_test));
            for p in 0..partitions {
                // In another order, of the whole set and of a partition that was sent.
                let rows: Vec<usize> = (0..parts.len(p)).rev().map(|i| parts.sample(p, i)).collect();
                let here = filled(data, prepared, &rows, Some(draw));
                let sent: Vec<usize> = (0..parts.len(p)).map(|i| parts.sample(p, i)).collect();
                let sent = Dataset::from_bytes(&data.select(&sent).to_bytes()).unwrap();
                prepared.check_samples(&sent).unwrap();
                let places: Vec<usize> = (0..sent.samples()).rev().collect();
                let there = filled(&sent, prepared, &places, Some(draw.of_partition(&parts, p)));
                prop_assert_eq!((&here.ids, &here.targets), (&there.ids, &there.targets));
                for (i, row) in rows.iter().enumerate() {
                    let alone = filled(data, prepared, &[*row], Some(draw));
                    let before = filled(data, prepared, &rows[..i], Some(draw)).ids.len();
                    prop_assert_eq!(&here.ids[before..before + alone.ids.len()], &alone.ids[..]);
                }
            }
        }
    }
}

#[test]
fn seeds_epochs_and_samples_have_candidates_of_their_own() {
    let Opened { train, prepared, .. } = some(1, implicit());
    let ids = |row: usize, draw: Draw<'_>| filled(&train, &prepared, &[row], Some(draw)).ids;
    let first = |row| ids(row, Draw::new(1, 0, None));
    let rows = || 0..train.samples();
    assert!(rows().filter(|row| ids(*row, Draw::new(2, 0, None)) != first(*row)).count() > 10);
    assert!(rows().filter(|row| ids(*row, Draw::new(1, 1, None)) != first(*row)).count() > 10);
    assert!(rows().filter(|row| ids(*row, Draw::test(1)) != first(*row)).count() > 10);
    // Without a draw there are none.
    assert_eq!(filled(&train, &prepared, &[3], None).ids, train.ids.of(3));
}

#[test]
fn samples_that_do_not_fit_are_refused() {
    let Opened { train, prepared, .. } = some(1, implicit());
    prepared.check_samples(&train).unwrap();
    let refused = |data: Dataset| assert!(prepared.check_samples(&data).is_err(), "{data:?}");
    refused(Dataset { targets: Targets::Value(vec![1.0; train.samples()]), ..(*train).clone() });
    for id in [15, NO_ID] {
        let mut other = (*train).clone();
        other.ids.values[1] = id;
        refused(other);
    }
    let all = (0..15).map(|item| (7, item)).collect();
    for seen in [Seen::new(vec![(7, 15)]), Seen::new(all)] {
        refused(Dataset { targets: Targets::Seen(seen.into()), ..(*train).clone() });
    }
    let explicit = Prepared { implicit: None, ..prepared.clone() };
    assert!(explicit.check_samples(&train).is_err());
    let candidates = prepared.implicit.unwrap();
    for wrong in [
        Candidates { items: 14, ..candidates },
        Candidates { items: 1, ..candidates },
        Candidates { negatives: 0, ..candidates },
        Candidates { k: 0, ..candidates },
    ] {
        assert!(Prepared { implicit: Some(wrong), ..prepared.clone() }.check().is_err(), "{wrong:?}");
    }
}
