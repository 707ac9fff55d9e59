//! Memory that a step goes through from one end to the other.

/// Less is not worth asking for.
#[cfg(target_os = "linux")]
const LEAST: usize = 2 << 20;

/// `len` zeros on huge pages, where the system has such for who asks for them (madvise(2), `MADV_HUGEPAGE`): of small ones there
/// are more than a processor keeps the places of, and each must be looked up anew.
pub fn zeros(len: usize) -> Vec<f32> {
    let values = vec![0.0; len];
    #[cfg(target_os = "linux")]
    ask(&values);
    values
}

#[cfg(target_os = "linux")]
#[allow(unsafe_code, reason = "a hint about memory, whose content stays as it is")]
fn ask(values: &[f32]) {
    let page = rustix::param::page_size();
    let start = values.as_ptr().cast::<u8>().align_offset(page) / size_of::<f32>();
    let Some(whole) =
        values.get(start..).map(size_of_val).map(|bytes| bytes / page * page).filter(|bytes| *bytes >= LEAST)
    else {
        return;
    };
    // SAFETY: whole pages inside of the values, which stay as they are. Where the system has none, it says so.
    unsafe {
        rustix::mm::madvise(values[start..].as_ptr().cast_mut().cast(), whole, rustix::mm::Advice::LinuxHugepage)
    }
    .ok();
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    /// What the system says of the mapping around a value: "hg" is that huge pages were asked for (proc(5), smaps).
    fn flags(value: &f32) -> String {
        let (place, all) =
            (value as *const f32 as u64, std::fs::read_to_string("/proc/self/smaps").expect("it is there"));
        let mut inside = false;
        for line in all.lines() {
            let range = line.split(' ').next().and_then(|range| range.split_once('-'));
            let bounds = range.map(|(from, to)| (u64::from_str_radix(from, 16), u64::from_str_radix(to, 16)));
            if let Some((Ok(from), Ok(to))) = bounds {
                inside = (from..to).contains(&place);
            } else if inside && let Some(flags) = line.strip_prefix("VmFlags:") {
                return format!("{flags} ");
            }
        }
        panic!("no mapping holds {place:x}");
    }

    #[test]
    fn large_memory_asks_for_huge_pages_and_is_zero() {
        let values = zeros(3 << 20);
        assert!(values.iter().all(|value| *value == 0.0));
        if std::path::Path::new("/sys/kernel/mm/transparent_hugepage/enabled").exists() {
            assert!(flags(&values[1 << 20]).contains(" hg "), "{}", flags(&values[1 << 20]));
        }
        for len in [0, 1, 1000, 4096] {
            assert_eq!(zeros(len), vec![0.0; len]);
        }
    }
}
