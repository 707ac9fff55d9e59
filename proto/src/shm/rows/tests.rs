//! Rows that are put, found, changed and told of.

use super::*;
use unisono_common::rows::key;

/// The place of a key's row.
fn find(rows: &Rows, key: u64) -> Option<u32> {
    let mut place = None;
    rows.each_place(&[key], |_, _| true, |_, at| place = Some(at));
    place.filter(|place| *place != NOWHERE)
}

fn has_changed(rows: &RowStore, key: u64, since: u64) -> bool {
    let mut changed = false;
    rows.each_row(&[key], Some(since), |_, _| changed = true);
    changed
}

fn capacity(rows: u32) -> Capacity {
    Capacity { width: 3, state: 1, rows }
}

#[test]
fn rows_are_found_where_they_were_put_however_many_there_are() {
    let mut store = RowStore::create(capacity(5000)).expect("memory");
    for id in 0..5000u64 {
        let place = store.place(key(id), 0, |row| row.fill(id as f32)).expect("room");
        assert_eq!((place as u64, store.place(key(id), 0, |_| panic!("it is there"))), (id, Ok(place)));
    }
    assert_eq!((store.len(), store.place(key(5000), 0, |_| ())), (5000, Err(Full)));
    let keys: Vec<u64> = [7, 6000, 4999].map(key).to_vec();
    let mut out = vec![9.0; 9];
    store.read(&keys, &mut out, |absent, row| {
        assert_eq!(absent, key(6000));
        row.fill(-1.0);
    });
    assert_eq!(out, [7.0, 7.0, 7.0, -1.0, -1.0, -1.0, 4999.0, 4999.0, 4999.0]);
    let mut ids: Vec<u64> = (0..4000).step_by(3).collect();
    ids.sort_by_key(|id| key(*id));
    let keys: Vec<u64> = ids.iter().copied().map(key).collect();
    let make = || {
        |(of, i): (u64, usize), is_new, row: &mut [f32]| {
            assert_eq!((of, is_new, &*row), (key(ids[i]), false, &[ids[i] as f32; 4][..]));
            row.fill(10_000.0 + ids[i] as f32);
        }
    };
    let mut plan = store.plan(keys, 1, vec![9.0], make);
    assert_eq!(plan.places().map(|(_, place)| place as u64).collect::<Vec<_>>(), ids);
    assert!((0..5000).all(|id| store.row(id) == [id as f32; 4]), "what is planned is not there yet");
    store.put(&mut plan).expect("room");
    for id in 0..5000 {
        let more = if id < 4000 && id % 3 == 0 { 10_000.0 } else { 0.0 };
        assert_eq!(store.row(id), [more + id as f32; 4]);
    }
    // Some are new: places in the order of their keys behind all others, through several generations.
    let mut ids: Vec<u64> = (0..3000).collect();
    ids.sort_by_key(|id| key(*id));
    let keys: Vec<u64> = ids.iter().copied().map(key).collect();
    let make = || {
        |(_, i): (u64, usize), is_new, row: &mut [f32]| {
            assert_eq!(is_new, ids[i] >= 700);
            row.fill(2.0 * ids[i] as f32);
        }
    };
    let grown = |in_place: bool| {
        let mut store = RowStore::create(capacity(5000)).expect("memory");
        for id in 0..700u64 {
            store.place(key(id), 0, |row| row.fill(id as f32)).expect("room");
        }
        let spare = Vec::new();
        let mut plan = match in_place {
            true => store.plan_in_place(keys.clone(), 1, spare, make),
            false => store.plan(keys.clone(), 1, spare, make),
        };
        let times = if in_place { 2.0 } else { 1.0 };
        assert!(store.len() == 700 && (0..700).all(|id| store.row(id) == [times * id as f32; 4]));
        store.put(&mut plan).expect("room");
        let new: Vec<u32> = keys.iter().filter_map(|key| find(&store, *key)).filter(|place| *place >= 700).collect();
        assert_eq!((store.len(), new), (3000, (700..3000).collect()));
        let row = |id: u64| find(&store, key(id)).map(|place| store.row(place));
        assert!((0..3000u64).all(|id| row(id) == Some(&[2.0 * id as f32; 4][..])));
        store
    };
    grown(true);
    let mut store = grown(false);
    // All have room, or none has.
    let more: Vec<u64> = (1..=2001).map(|i| i << 40).collect();
    let mut put = |keys: &[u64]| {
        let mut plan = store.plan(keys.to_vec(), 2, Vec::new(), || |_, _, row: &mut [f32]| row.fill(0.0));
        (store.put(&mut plan), store.len(), find(&store, 1 << 40))
    };
    assert_eq!(put(&more), (Err(Full), 3000, None));
    assert_eq!(put(&more[1..]), (Ok(()), 5000, None));
    // Keys that begin alike, up to the end of the index and around it.
    let mut store = RowStore::private(capacity(5000)).expect("memory");
    for low in 0..600u64 {
        assert_eq!(store.place(u64::MAX - low, 0, |_| ()), Ok(low as u32));
    }
    assert!((0..600u64).all(|low| find(&store, u64::MAX - low) == Some(low as u32)));
    assert_eq!(find(&store, 5), None);
}

#[test]
fn rows_that_have_changed_are_given_with_their_numbers() {
    let mut store = RowStore::private(capacity(3000)).expect("memory");
    // More than are looked for ahead; every seventh has no row.
    let ids: Vec<u64> = (0..2 * AHEAD as u64 + 10).collect();
    let keys: Vec<u64> = ids.iter().map(|id| key(*id)).collect();
    for id in ids.iter().filter(|id| *id % 7 > 0) {
        store.place(key(*id), id % 5, |row| row.fill(*id as f32)).expect("room");
    }
    for since in [None, Some(0), Some(2), Some(4)] {
        let mut given = Vec::new();
        store.each_row(&keys, since, |i, row| given.push((i as u64, row.to_vec())));
        let want = ids.iter().filter(|id| *id % 7 > 0 && since.is_none_or(|since| *id % 5 > since));
        assert_eq!(given, want.map(|id| (*id, vec![*id as f32; 3])).collect::<Vec<_>>(), "since {since:?}");
    }
}

/// Whoever asks gets all that have changed, also before anybody had asked, and then no others.
#[test]
fn changes_are_told_from_when_they_are_asked_for() {
    for in_place in [false, true] {
        let mut store = RowStore::private(capacity(10)).expect("memory");
        (1..=4).for_each(|key| assert!(store.place(key << 40, 0, |_| ()).is_ok()));
        let change = |store: &mut RowStore, step, keys: &[u64]| {
            let (keys, make) = (keys.iter().map(|key| key << 40).collect(), || |_, _, _: &mut [f32]| ());
            match in_place {
                true => store.plan_in_place(keys, step, Vec::new(), make),
                false => store.plan(keys, step, Vec::new(), make),
            }
        };
        let changed = |store: &RowStore, since| -> Vec<u64> {
            (1..=5).filter(|key| has_changed(store, key << 40, since)).collect()
        };
        let mut plan = change(&mut store, 1, &[1]);
        store.put(&mut plan).expect("room");
        // Asked between what is planned and what is put, which was not told.
        let mut plan = change(&mut store, 2, &[2, 5]);
        assert_eq!(changed(&store, 0), [1, 2, 3, 4]);
        store.put(&mut plan).expect("room");
        assert_eq!((changed(&store, 1), changed(&store, 2)), (vec![1, 2, 3, 4, 5], vec![]));
        let mut plan = change(&mut store, 3, &[3, 5]);
        store.put(&mut plan).expect("room");
        assert_eq!((changed(&store, 2), changed(&store, 3)), (vec![3, 5], vec![]));
        assert_eq!(changed(&store, 1), [1, 2, 3, 4, 5]);
    }
}

#[test]
#[should_panic(expected = "keys are ascending")]
fn no_row_is_changed_twice() {
    RowStore::private(capacity(10)).expect("memory").plan(vec![5, 5], 1, Vec::new(), || |_, _, _: &mut [f32]| ());
}

#[test]
fn bytes_are_what_was_allowed() {
    for (width, bytes) in [(17, 1 << 20), (17, 1 << 30), (1, 1 << 26), (100, 1 << 32)] {
        let capacity = Capacity::of_bytes(width, 1, bytes);
        assert!(capacity.bytes() as u64 <= bytes + (3 * PAGE) as u64, "{width} {bytes}: {}", capacity.bytes());
        assert!(capacity.rows as u64 * width as u64 * 4 > bytes / 40);
    }
}

/// Memory comes a huge page at a time, ahead of the rows: whoever has the memory mapped already sees what is put there, and
/// no more is taken than the rows need, and a huge page of each part.
#[cfg(target_os = "linux")]
#[test]
fn many_rows_are_read_by_others_and_take_what_they_need() {
    let capacity = Capacity { width: 16, state: 0, rows: 1 << 20 };
    let mut store = RowStore::create(capacity).expect("memory");
    let file = store.memory().file().expect("a file").try_clone_to_owned().expect("a second handle");
    let taken = |store: &RowStore| {
        let file = store.memory().file().expect("a file");
        512 * rustix::fs::fstat(file).expect("its size").st_blocks as usize
    };
    assert_eq!(taken(&store), 0);
    let always = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
    let always = always.is_ok_and(|said| ["[always]", "[force]"].iter().any(|on| said.contains(on)));
    let theirs = Rows::of(Memory::open(file, capacity.bytes(), false).expect("for reading"), capacity);
    for id in 0..100_000u64 {
        assert_eq!(find(&theirs, key(id)), None);
        store.place(key(id), id, |row| row.fill(id as f32)).expect("room");
        assert_eq!(find(&theirs, key(id)).map(|place| theirs.values(place)), Some(&[id as f32; 16][..]));
        if id == 1000 && !always {
            assert!(taken(&store) < 1 << 20, "{} bytes for few rows", taken(&store));
        }
    }
    assert!((0..100_000u64).all(|id| find(&theirs, key(id)).map(|place| theirs.values(place)[15]) == Some(id as f32)));
    let (rows, index) = (100_000 * 64, capacity.index_at(9) - capacity.index_at(0));
    let taken = taken(&store);
    assert!(
        (rows..rows + index + 2 * HUGE).contains(&taken),
        "{taken} bytes for {rows} of rows and {index} of their index"
    );
    // Of each row it is known when it changed last.
    let since = |since, id| has_changed(&store, key(id), since);
    assert!(since(41, 42) && !since(42, 42) && !since(0, 200_000));
    // Also where its 32 bits have begun anew.
    let anew = (1 << 32) + 1;
    store.place(key(100_000), anew, |_| ()).expect("room");
    let since = |since| has_changed(&store, key(100_000), since);
    assert!(since(anew - 2) && since(anew - 1) && !since(anew));
}

#[cfg(target_os = "linux")]
#[test]
fn others_read_what_was_written() {
    let mut store = RowStore::create(capacity(3000)).expect("memory");
    let file = store.memory().file().expect("a file").try_clone_to_owned().expect("a second handle");
    let memory = Memory::open(file, capacity(3000).bytes(), false).expect("for reading");
    let theirs = Rows::of(memory, capacity(3000));
    assert!(theirs.is_empty() && find(&theirs, key(1)).is_none());
    for id in 0..3000u64 {
        store.place(key(id), 0, |row| row.fill(id as f32)).expect("room");
    }
    assert!((0..3000u64).all(|id| theirs.values(find(&theirs, key(id)).expect("a row"))[1] == id as f32));
}
