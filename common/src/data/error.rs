//! Everything that can be wrong with data, with the place and the way out.

use std::fmt;
use std::io;
use std::sync::Arc;

/// Where a row of a table is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct At {
    pub path: Arc<str>,
    /// Counted from 1.
    pub row: usize,
    /// Whether `row` is a line of the file, which may have others that are no rows.
    pub lines: bool,
}

impl At {
    /// A line of a file.
    pub(super) fn line(path: &str, row: usize) -> At {
        At { path: path.into(), row, lines: true }
    }
}

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let between = if self.lines { ":" } else { ", row " };
        write!(f, "{}{between}{}", self.path, self.row)
    }
}

/// Why a data set cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    #[error(
        "there is no {what} `{path}`: looked for {tried}; set UNISONO_DATA to the folder that holds it, or correct the \
         path in the job file"
    )]
    Missing { what: &'static str, path: String, tried: String },
    #[error(
        "{path} is outside the folders that this worker may read ({only}): allow its folder with --data-root, or set data.ship = true in the job"
    )]
    Outside { path: String, only: String },
    #[error("{path} is in a folder with an identity (ca.crt), which no job may read: move the data to another folder")]
    BesideKeys { path: String },
    #[error("cannot read {path}: {source}; check its permissions, and that it was copied whole")]
    Read { path: String, source: io::Error },
    #[error("data.format {format:?}: {source}")]
    Added { format: String, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("{path} holds no samples; give a file with at least one")]
    Empty { path: String },

    #[error(
        "{path} starts with {found:#010x}, but a file of IDX {what} starts with {want}; are data's `images` and \
         `labels` swapped?"
    )]
    Magic { path: String, found: u32, what: &'static str, want: &'static str },
    #[error(
        "{path} ends too early: its header announces {want} bytes of samples, {got} are there; copy the file again"
    )]
    Truncated { path: String, want: u128, got: usize },
    #[error("{path} ends within its header: copy the file again")]
    TruncatedHeader { path: String },
    #[error("{path} goes on after the {want} bytes of samples that its header announces; copy the file again")]
    Trailing { path: String, want: u128 },
    #[error(
        "{images} has {image_count} images, but {labels} has {label_count} labels; give files that belong together"
    )]
    Counts { images: String, image_count: usize, labels: String, label_count: usize },
    #[error(
        "samples in {path} have shape {test:?}, those of the training set {train:?}; give a test set of the same shape"
    )]
    TestShape { path: String, test: Vec<usize>, train: Vec<usize> },
    #[error(
        "{path}: sample {sample} has label {label}, but the training set's labels end at {last}; correct the label, or \
         train on samples of that class too"
    )]
    TestLabel { path: String, sample: usize, label: u8, last: usize },
    #[error("{path}: sample {sample} has label {label}, but labels end at {last}; correct the label, or data.classes")]
    Label { path: String, sample: usize, label: u8, last: u8 },
    #[error(
        "{path}: sample {sample} has label {label}, but there are only {used} different labels; correct the label, or set \
         data.classes if all is right"
    )]
    LoneLabel { path: String, sample: usize, label: u8, used: usize },

    #[error(
        "{path} gives {tokens} tokens; windows of data.context = {context} need at least {least}: use more text, or a \
         smaller context"
    )]
    ShortText { path: String, tokens: usize, context: usize, least: usize },
    #[error(
        "{at}: the text of column `{column}` has {tokens} tokens, more than data.context = {context}; raise it, or set \
         data.truncate = true"
    )]
    LongText { at: At, column: String, tokens: usize, context: usize },
    #[error(
        "{at}: the text of column `{column}` is empty, or nothing in it has a token; fill it in, or remove the row"
    )]
    NoText { at: At, column: String },
    #[error("the text is empty, or nothing in it has a token; write at least a word")]
    RowEmpty,
    #[error("the text has {tokens} tokens, the model takes at most {context}; shorten it")]
    RowText { tokens: usize, context: usize },
    #[error("data.holdout = {share} leaves nothing of {path} to {what}; change it, or give data.test")]
    Holdout { share: f64, path: String, what: &'static str },
    #[error(
        "{at}: the text of column `{column}` has the character {character:?}, which no text of the training set has; \
         remove the row, or set data.tokenizer = \"bytes\" or \"words\""
    )]
    NewCharacter { at: At, column: String, character: char },
    #[error(
        "{path} is no tokenizer that can be used: {why}; give a tokenizer.json as Hugging Face's tokenizers write it, or set \
         data.tokenizer = \"bytes\" or \"words\""
    )]
    Tokenizer { path: String, why: String },
    #[error(
        "data.tokenizer is {what}, a tokenizer that is not the model's: set it as it was when the model was trained (a \
         file need not be there: the model has its own)"
    )]
    OtherTokenizer { what: String },
    #[error("the tokenizer has no tokens for the text: {why}; write it otherwise")]
    NoTokens { why: String },
    #[error("the tokenizer has no tokens for {path}: {why}; correct the text, or take another tokenizer")]
    FileTokens { path: String, why: String },
    #[error("the tokenizer has no text for the model's tokens: {why}; train with another tokenizer")]
    Undecoded { why: String },
    #[error(
        "{at}: the tokenizer has no tokens for the text of column `{column}`: {why}; correct the row or remove it, or set \
         data.on_error = \"skip\""
    )]
    CellTokens { at: At, column: String, why: String },
    #[error("column `{column}` is data.target and data.text; they must be different")]
    TargetText { column: String },
    #[error("the character {character:?} is in no text that the model was trained on; leave it out")]
    Character { character: char },

    #[error("{path}:{line}: this is not UTF-8 text; convert the file to UTF-8")]
    NotText { path: String, line: usize },
    #[error(
        "{at}: a cell begins with a quote (\") that nothing closes up to the file's end; close it, or set data.quoting = false where quotes \
         are a part of the text"
    )]
    OpenQuote { at: At },
    #[error("data.separator is {separator:?}; it must be one ASCII character, not a quote and not a line end")]
    Separator { separator: char },
    #[error("{path} has no column names; set data.header = true if its first line holds them, or give data.columns")]
    NoNames { path: String },
    #[error("{path} has two columns `{column}`; give each its own name (data.columns can rename them)")]
    SameName { path: String, column: String },
    #[error("data.{key} names the column `{column}`, which {path} does not have; the nearest is `{nearest}`")]
    NoColumn { key: &'static str, column: String, path: String, nearest: String },
    #[error("column `{column}` is {one} and {other}; take it out of one")]
    Twice { column: String, one: &'static str, other: &'static str },
    #[error(
        "{at}: column `{column}` (data.weight) holds `{cell}`, which is no weight (0, or a finite number above 1e-37); correct it, or remove the row"
    )]
    Weight { at: At, column: String, cell: String },
    #[error(
        "all weights in column `{column}` (data.weight) of the rows of {path} to {what} are 0: nothing would count; correct some, or \
         leave out data.weight"
    )]
    NoWeight { path: String, column: String, what: &'static str },
    #[error(
        "data.log names the column `{column}`, which does not hold numbers that are learnt from: it is the target, or in data.ids, \
         data.categorical or data.ignore; take it out of data.log, or out of that"
    )]
    NotNumeric { column: String },
    #[error(
        "{at}: column `{column}` holds `{cell}`, which is not a whole number below {size}; correct it, raise its `size` \
         in data.ids, or leave `size` out, for ids by their hash"
    )]
    Id { at: At, column: String, cell: String, size: u64 },
    #[error("{path}:{line}: column `{column}` is empty; fill it in, or remove the line")]
    EmptyCell { path: String, line: usize, column: &'static str },
    #[error(
        "{path}:{line}: column `{column}` holds `{cell}`, which is not a finite number; correct it, or say with data.columns which cell \
         is which, and with data.header = true that the first line holds names"
    )]
    RatingNumber { path: String, line: usize, column: &'static str, cell: String },
    #[error(
        "a line of {path} has {found}, and no `{missing}`; say which cell is which, for example data.columns = [\"user\", \
         \"item\", \"rating\", \"time\"], or correct data.separator"
    )]
    NoCell { path: String, found: String, missing: &'static str },
    #[error(
        "{path}:{line}: {got} cells; a line needs at least {want} ({names}): correct data.separator, or say which cell is which in data.columns"
    )]
    FewCells { path: String, line: usize, got: usize, want: usize, names: String },
    #[error(
        "{path}:{line}: the item `{item}` is in no line of the training file, so it cannot be ranked; remove the line, or train on that \
         item too"
    )]
    UnknownItem { path: String, line: usize, item: String },
    #[error("no rating of {path} is at least data.implicit.threshold = {threshold}; lower it")]
    NoPositives { path: String, threshold: f32 },
    #[error(
        "{path}: the user `{user}` has all {items} items of the training set, whatever the rating, and none is left to compare with; \
         remove that user, or add items"
    )]
    AllItems { path: String, user: String, items: usize },
    #[error("data.holdout = \"last\" leaves nothing of {path} to test on: no user has two samples; give data.test")]
    NoLast { path: String },
    #[error(
        "{path} has {items} items, with names of {bytes} bytes; at most {most} items and 33554432 bytes are possible"
    )]
    TooManyItems { path: String, items: usize, bytes: usize, most: usize },
    #[error("{path} has no columns left to learn from; take some out of data.ignore")]
    NoFeatures { path: String },
    #[error(
        "the columns of {path} are {test:?}, those of the training set {train:?}; give both files the same, in \
         the same order"
    )]
    TestColumns { path: String, test: String, train: String },
    #[error("{at}: {got} cells, but there are {want} columns; correct the line, data.separator or data.columns")]
    Ragged { at: At, got: usize, want: usize },
    #[error(
        "{at}: column `{column}` holds `{cell}`, which is not a finite number; correct it, or add the \
         column to \
         data.categorical or data.ignore, or set data.missing if that text stands for a missing value"
    )]
    Number { at: At, column: String, cell: String },
    #[error(
        "{at}: target `{column}` holds `{cell}`, which is not a finite number; correct it, or set \
         data.task = \"classification\""
    )]
    TargetNumber { at: At, column: String, cell: String },
    #[error("{at}: target `{column}` is missing; fill it in, or remove the row")]
    NoTarget { at: At, column: String },
    #[error(
        "{at}: target `{column}` is `{label}`, a class that the training set does not have; correct it, \
         or train \
         on samples of that class too"
    )]
    UnknownLabel { at: At, column: String, label: String },
    #[error(
        "{at}: this is not one JSON object on a line of its own: {why}; correct the line, or set data.on_error = \"skip\" to leave \
         such lines out"
    )]
    Json { at: At, why: String },
    #[error("{at}: the key `{column}` is there twice; give each its own name")]
    SameKey { at: At, column: String },
    #[error(
        "{at}: column `{column}` holds {what}; a cell is a number, a text, true, false or null: write it as one of these, or add the \
         column to data.ignore"
    )]
    Nested { at: At, column: String, what: &'static str },
    #[error(
        "{path} cannot be read as Parquet: {why}; copy it again, or write it anew, not compressed or with snappy or gzip (zstd is for \
         programs that were built with `--features parquet-zstd`)"
    )]
    Parquet { path: String, why: String },
    #[error(
        "column `{column}` of {path} holds {what}; cells are numbers, texts, true or false: write it as one of these, or add the column \
         to data.ignore"
    )]
    ParquetColumn { path: String, column: String, what: &'static str },
    #[error(
        "{path} is to be read as Parquet, and this program was built without that: build it with `--features parquet`, or write the \
         file as CSV or JSON lines"
    )]
    WithoutParquet { path: String },
    #[error("{at}: {why}")]
    LibSvm { at: At, why: super::libsvm::Wrong },
    #[error(
        "{samples} samples with {fields} places for features each do not fit in memory: all have as many as the longest line; take very \
         long lines out"
    )]
    SparseTooLarge { samples: usize, fields: usize },
    #[error("{at}: this is not UTF-8 text; convert the file to UTF-8")]
    RowNotText { at: At },
    #[error(
        "{count} of the rows or files cannot be used, and data.max_errors = {most}: correct them, or raise it. The first:{first}"
    )]
    TooManyBad { count: usize, most: usize, first: String },
    #[error("column `{column}` of {path} is missing in every line; add it to data.ignore")]
    NoValues { path: String, column: String },
    #[error(
        "column `{column}` of {path} has {values} different values, more than the {most} that are one-hot \
         encoded; take it \
         out of data.categorical, or add it to data.ignore"
    )]
    TooManyValues { path: String, column: String, values: usize, most: usize },
    #[error(
        "target `{column}` of {path} has {classes} different values, more than the {most} classes that are possible; set \
         data.task = \"regression\" if they are measurements"
    )]
    TooManyClasses { path: String, column: String, classes: usize, most: usize },

    #[error(
        "the column `{column}` is not given; give every column that the model was trained on (an empty cell means \
         unknown)"
    )]
    CellAbsent { column: String },
    #[error(
        "column `{column}` is `{cell}`, which is not a finite number; correct it, or leave the cell empty if it \
         is unknown"
    )]
    CellNumber { column: String, cell: String },
    #[error(
        "column `{column}` is `{cell}`, which is not a whole number below {size}, as in training; correct it, or leave the cell empty \
         if it is unknown"
    )]
    CellId { column: String, cell: String, size: u64 },
    #[error("column `{column}` is `{cell}`, which the model was not trained on; correct it, or remove the row")]
    CellUnknown { column: String, cell: String },

    #[error("synthetic data need {what}; correct data.{key}")]
    Synthetic { what: &'static str, key: &'static str },
    #[error("{samples} samples of {features} features do not fit in memory; lower data.samples or data.shape")]
    TooLarge { samples: usize, features: usize },

    #[error(
        "{path} has {got} bytes, which is no whole number of CIFAR-{classes}'s samples of {record} bytes; copy the file again, \
         or set data.classes = {other}"
    )]
    Cifar { path: String, got: usize, record: usize, classes: usize, other: usize },
    #[error(
        "{path} holds {found} folder{} of pictures; give a folder that has a folder for each class, two at least", if *found == 1 { "" } else { "s" }
    )]
    NoClasses { path: String, found: usize },
    #[error("{path} is a class's folder, but it holds no pictures; add some, or remove the folder")]
    EmptyClass { path: String },
    #[error(
        "{path} is of the class `{class}`, for which there is no folder in {train}; train on that class too, or remove the folder"
    )]
    OtherClass { path: String, class: String, train: String },
    #[error(
        "{path} cannot be read as a picture: {why}; copy it again or convert it to PNG or JPEG, or take it out of the folder"
    )]
    Picture { path: String, why: String },
    #[error("{pictures} pictures of {len} bytes do not fit in memory; lower data.size")]
    PicturesTooLarge { pictures: usize, len: usize },
    #[error("data.augment is for pictures, [channels, height, width]; the samples have shape {shape:?}: leave it out")]
    NoPictures { shape: Vec<usize> },
    #[error("data.augment.crop = {crop} can leave nothing of pictures of {height}x{width}; make it smaller than both")]
    Crop { crop: usize, height: usize, width: usize },

    #[error("train.partitions is 0; set it to at least 1")]
    NoPartitions,
    #[error("{samples} samples are more than a data set may have (4,294,967,295); leave some out")]
    TooManySamples { samples: usize },
    #[error(
        "{samples} samples do not fill {partitions} partitions; lower train.partitions to at most {samples}, or \
         use more data"
    )]
    TooFewSamples { samples: usize, partitions: u32 },
    #[error(
        "no sample of {samples} falls into partition {partition} of {partitions} by hash; choose another seed, \
         contiguous \
         partitions (leave out data.partition = \"hashed\"), or lower train.partitions"
    )]
    EmptyPartition { partition: u32, partitions: u32, samples: usize },

    #[error("samples that were sent cannot be decoded: {0}; do both sides run the same version?")]
    Encoded(&'static str),
}

impl DataError {
    /// For `map_err` on input and output.
    pub(super) fn read(path: &str) -> impl FnOnce(io::Error) -> DataError {
        let path = path.to_string();
        move |source| DataError::Read { path, source }
    }
}
