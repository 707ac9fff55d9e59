//! The keys of data that are pictures.

use super::super::reader::{Node, Reader, Result, size, text};
use super::data::test_set;
use super::{Augment, Cifar, Images};

pub(super) fn cifar(r: &Reader<'_>, base: &str) -> Result<Cifar> {
    let paths = |key| r.list(key, "the path of a file", |k| text(k).filter(|path| !path.is_empty()));
    let train = paths("train")?.needed("train = [\"cifar-10/data_batch_1.bin\"]")?;
    if train.is_empty() {
        return r.refuse("train", "is empty; write for example [\"cifar-10/data_batch_1.bin\"]");
    }
    let classes = r.integer("classes", 10..=100)?.or(10) as usize;
    if !matches!(classes, 10 | 100) {
        return r.refuse("classes", &format!("is {classes}; CIFAR has 10 or 100"));
    }
    Ok(Cifar { base: base.into(), train, test: paths("test")?.or(Vec::new()), classes })
}

pub(super) fn images(r: &Reader<'_>, base: &str) -> Result<Images> {
    let (test, holdout) = test_set(r)?;
    let sizes = r.list("size", "a number of pixels from 1 to 4096", |k| size(k).filter(|n| *n <= 4096))?;
    let &[height, width] = &sizes.needed("size = [32, 32]")?[..] else {
        return r.refuse("size", "must be [height, width], for example [32, 32]");
    };
    let channels = r.integer("channels", 1..=3)?.or(3) as usize;
    if channels == 2 {
        return r.refuse("channels", "is 2; pictures have 1 (grey) or 3 (red, green, blue)");
    }
    let train = r.text("train")?.needed("train = \"pictures/train\"")?;
    Ok(Images { base: base.into(), train, test, holdout, size: [height, width], channels })
}

pub(super) fn augment(node: &Node) -> Result<Augment> {
    let r = Reader::new(node, "data.augment")?;
    r.only(&["crop", "flip"])?;
    let crop = r.integer("crop", 0..=4096)?.optional();
    let flip = r.flag("flip")?.optional();
    if crop.is_none() && flip.is_none() {
        return r.error("`data.augment` is empty; write for example { crop = 4, flip = true }");
    }
    Ok(Augment { crop: crop.unwrap_or(0) as usize, flip: flip.unwrap_or(false) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::{Data, JobText, Source, parse};

    fn read(data: &str) -> Result<Data> {
        let toml = format!("data = {{ {data} }}\nmodel = {{ kind = \"linear\" }}\ntrain = {{ epochs = 1 }}\n");
        let text = JobText { file: "job.toml".into(), base: "/base".into(), toml, overrides: vec![] };
        parse(text).map(|job| job.data)
    }

    #[test]
    fn keys_have_their_defaults_and_every_key_counts() {
        let least = read("format = \"cifar\", train = [\"a\", \"b\"]").unwrap();
        let cifar = Cifar { base: "/base".into(), train: vec!["a".into(), "b".into()], test: vec![], classes: 10 };
        assert_eq!((least.source, least.normalize, least.augment), (Source::Cifar(cifar.clone()), true, None));
        let all = read("format = \"cifar\", train = [\"a\", \"b\"], test = [\"t\"], classes = 100").unwrap();
        assert_eq!(all.source, Source::Cifar(Cifar { test: vec!["t".into()], classes: 100, ..cifar }));

        let least = "format = \"images\", train = \"a\", size = [5, 7]";
        let images =
            Images { base: "/base".into(), train: "a".into(), test: None, holdout: None, size: [5, 7], channels: 3 };
        assert_eq!(read(least).unwrap().source, Source::Images(images.clone()));
        let tested = read(&format!("{least}, test = \"b\", channels = 1")).unwrap().source;
        assert_eq!(tested, Source::Images(Images { test: Some("b".into()), channels: 1, ..images.clone() }));
        let split = read(&format!("{least}, holdout = 0.25")).unwrap().source;
        assert_eq!(split, Source::Images(Images { holdout: Some(0.25), ..images }));

        for (keys, crop, flip) in [("crop = 4", 4, false), ("flip = true", 0, true), ("crop = 2, flip = true", 2, true)]
        {
            let data = read(&format!("{least}, augment = {{ {keys} }}")).unwrap();
            assert_eq!(data.augment, Some(Augment { crop, flip }));
        }
    }

    #[test]
    fn mistakes_are_named_with_the_way_out() {
        let says = |data: &str, part: &str| {
            let message = read(data).unwrap_err().to_string();
            assert!(message.starts_with("job.toml:1: ") && message.contains(part), "{message}\n(wanted {part})");
        };
        says("format = \"cifar\"", "`data.train` is missing; write for example `train = [\"cifar-10/");
        says("format = \"cifar\", train = \"a\"", "`data.train` must be a list, each item the path of a file");
        says("format = \"cifar\", train = []", "`data.train` is empty");
        says("format = \"cifar\", train = [\"a\"], classes = 20", "`data.classes` is 20; CIFAR has 10 or 100");
        let images = |more: &str| format!("format = \"images\", train = \"a\", {more}");
        says(&images("channels = 1"), "`data.size` is missing; write for example `size = [32, 32]`");
        says(&images("size = [32]"), "`data.size` must be [height, width]");
        says(&images("size = [0, 8]"), "each item of `data.size` must be a number of pixels from 1 to 4096, not 0");
        says(&images("size = [8, 8], channels = 2"), "`data.channels` is 2; pictures have 1 (grey) or 3");
        says(&images("size = [8, 8], test = \"b\", holdout = 0.5"), "`data.holdout` and `data.test` are both given");
        says(&images("size = [8, 8], augment = {}"), "`data.augment` is empty; write for example { crop = 4");
        says(&images("size = [8, 8], augment = { crp = 4 }"), "did you mean `crop`?");
        says("format = \"digits\", augment = { flip = true }", "unknown key `data.augment`");
        let language = "format = \"synthetic\", task = \"language\", vocabulary = 5, context = 4, samples = 80";
        says(&format!("{language}, augment = {{ flip = true }}"), "`data.augment` is for another `data.task`");
    }
}
