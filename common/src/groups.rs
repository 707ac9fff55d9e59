//! Parameter groups: which settings of the optimizer each parameter has.

use crate::job;
use crate::layout::{Kind, Layout, Role, Tensor};
use crate::optim::Optimizer;
use std::ops::Range;

/// Why a group cannot be used.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error(
    "train.groups[{group}].params names \"{params}\", which no parameter is: write \"biases\", \"norms\", \"embeddings\", or a \
     tensor's name, in which `*` stands for any text (sparse tables have train.tables); this model has {known}"
)]
pub struct GroupError {
    group: usize,
    params: String,
    known: String,
}

/// The optimizer of every trainable value.
#[derive(Clone, Debug)]
pub struct Groups {
    /// The job's, and those of its groups.
    optimizers: Vec<Optimizer>,
    /// Values with the same optimizer, and of one tensor where it looks at whole tensors; one after the other.
    runs: Vec<Run>,
}

#[derive(Clone, Debug)]
struct Run {
    end: usize,
    optimizer: usize,
}

/// Values that are updated together.
pub struct Part<'a> {
    /// The number of its run, of which another chunk may have values as well.
    pub run: usize,
    pub range: Range<usize>,
    pub optimizer: &'a Optimizer,
}

impl Groups {
    /// `base` for all parameters of a model, with the settings of their groups.
    ///
    /// # Errors
    /// A group that is for no parameter.
    pub fn new(base: Optimizer, groups: &[job::Group], layout: &Layout) -> Result<Groups, GroupError> {
        let of_groups = groups.iter().map(|group| base.with(group.lr, group.weight_decay));
        let optimizers: Vec<Optimizer> = std::iter::once(base.clone()).chain(of_groups).collect();
        let trainable = || layout.tensors().filter(|(tensor, _)| tensor.role == Role::Trainable);
        for (i, group) in groups.iter().enumerate() {
            if let Some(params) = group.params.iter().find(|params| !trainable().any(|(t, _)| selects(params, t))) {
                let names: Vec<String> = trainable().map(|(t, _)| format!("`{}`", t.name)).collect();
                let known = match names.len() {
                    0 => "none but sparse tables".into(),
                    1..=6 => names.join(", "),
                    n => format!(
                        "{}, ... `{}`",
                        names[..3].join(", "),
                        trainable().nth(n - 1).map_or("", |(t, _)| &t.name)
                    ),
                };
                return Err(GroupError { group: i, params: params.clone(), known });
            }
        }
        let mut runs: Vec<Run> = Vec::new();
        for (tensor, range) in trainable() {
            let of = |group: &job::Group| group.params.iter().any(|params| selects(params, tensor));
            let optimizer = groups.iter().position(of).map_or(0, |group| group + 1);
            match runs.last_mut() {
                Some(last) if last.optimizer == optimizer && !base.is_layerwise() => last.end = range.end,
                _ => runs.push(Run { end: range.end, optimizer }),
            }
        }
        Ok(Groups { optimizers, runs })
    }

    /// The optimizer of parameters without a group, whose state is like that of all.
    pub fn optimizer(&self) -> &Optimizer {
        &self.optimizers[0]
    }

    /// How many runs there are.
    pub fn runs(&self) -> usize {
        self.runs.len()
    }

    /// The parts of a range of the trainable values.
    pub fn parts(&self, range: Range<usize>) -> impl Iterator<Item = Part<'_>> {
        let first = self.runs.partition_point(|run| run.end <= range.start);
        let mut from = range.start;
        self.runs.iter().enumerate().skip(first).map_while(move |(i, run)| {
            let part = from..run.end.min(range.end);
            from = part.end;
            let optimizer = &self.optimizers[run.optimizer];
            (!part.is_empty()).then_some(Part { run: i, range: part, optimizer })
        })
    }
}

/// Whether a tensor is one of those that a job calls so.
fn selects(params: &str, tensor: &Tensor) -> bool {
    match params {
        "biases" => tensor.kind == Kind::Bias,
        "norms" => tensor.kind == Kind::Norm,
        "embeddings" => tensor.kind == Kind::Embedding,
        pattern => matches(pattern.as_bytes(), tensor.name.as_bytes()),
    }
}

/// Whether `name` is `pattern`, in which `*` stands for any text.
fn matches(pattern: &[u8], name: &[u8]) -> bool {
    let mut parts = pattern.split(|byte| *byte == b'*');
    let Some(mut rest) = parts.next().and_then(|first| name.strip_prefix(first)) else { return false };
    let Some(last) = parts.next_back() else { return rest.is_empty() };
    // The first place of each part leaves the most to those behind it.
    for part in parts.filter(|part| !part.is_empty()) {
        let Some(at) = rest.windows(part.len()).position(|window| window == part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::Model as Spec;
    use crate::model::{Model, Signature};
    use proptest::prelude::*;

    fn layout() -> Layout {
        let spec = Spec::Layers {
            layers: vec![
                job::Layer::Linear { units: 7, bias: true, init: None },
                job::Layer::LayerNorm { dims: None, eps: 1e-5 },
                job::Layer::Linear { units: 3, bias: true, init: None },
            ],
        };
        Model::build(&spec, &Signature::new(&[5], 3)).expect("a model").layout().clone()
    }

    fn group(params: &[&str], lr: Option<f32>) -> job::Group {
        job::Group { params: params.iter().map(|p| p.to_string()).collect(), lr, weight_decay: Some(0.0) }
    }

    fn lamb() -> job::Optimizer {
        job::Optimizer::Lamb { lr: 0.1, beta1: 0.9, beta2: 0.99, eps: 1e-6, weight_decay: 0.5 }
    }

    fn sgd() -> job::Optimizer {
        job::Optimizer::Sgd { lr: 0.1, momentum: 0.0, dampening: 0.0, nesterov: false, weight_decay: 0.5 }
    }

    #[test]
    fn each_tensor_has_the_settings_of_its_first_group() {
        let layout = layout();
        let groups = [group(&["biases"], None), group(&["0.*", "norms"], Some(0.0))];
        let groups = Groups::new(Optimizer::new(&sgd(), None), &groups, &layout).expect("all are used");
        let weights = layout.init(1);
        let mut out = vec![0.0; layout.len()];
        for part in groups.parts(0..layout.trainable()) {
            let at = part.range;
            let zeros = vec![0.0; at.len()];
            let update = part.optimizer.at(1, 1.0);
            assert!(update.run(&weights[at.clone()], crate::optim::Sums::mean(&zeros), &mut [], &mut out[at]));
        }
        // Without a gradient only weight decay moves anything: the second layer's weights are all that is left.
        for (tensor, at) in layout.tensors() {
            assert_eq!(weights[at.clone()] != out[at], tensor.name == "2.weight", "{}", tensor.name);
        }
    }

    #[test]
    fn a_group_for_nothing_is_named() {
        let of = |params: &[&str]| {
            let groups = [group(&["norms"], None), group(params, None)];
            Groups::new(Optimizer::new(&sgd(), None), &groups, &layout())
        };
        for params in ["embeddings", "0.wait", "3.*", ""] {
            let message = of(&["biases", params]).unwrap_err().to_string();
            let named = format!("train.groups[1].params names \"{params}\"");
            assert!(message.contains(&named) && message.contains("`0.weight`"), "{message}");
        }
        assert!(of(&["*.weight", "0.b*s", "*"]).is_ok());
    }

    proptest! {
        #[test]
        fn parts_are_the_whole_range_and_tensors_are_not_mixed_where_they_count(
            from in 0usize..80, len in 0usize..80, layerwise in any::<bool>(), grouped in any::<bool>(),
        ) {
            let layout = layout();
            let range = from.min(layout.trainable())..(from + len).min(layout.trainable());
            let range = range.start..range.end.max(range.start);
            let optimizer = if layerwise { lamb() } else { sgd() };
            let settings = if grouped { vec![group(&["biases"], None)] } else { vec![] };
            let groups = Groups::new(Optimizer::new(&optimizer, None), &settings, &layout).unwrap();
            let mut end = range.start;
            for part in groups.parts(range.clone()) {
                prop_assert_eq!(part.range.start, end);
                prop_assert!(!part.range.is_empty());
                end = part.range.end;
                let tensors = layout.tensors().filter(|(_, at)| at.start < end && part.range.start < at.end).count();
                prop_assert!(tensors == 1 || !layerwise);
            }
            prop_assert_eq!(end, range.end);
            prop_assert_eq!(groups.runs(), match (layerwise, grouped) { (true, _) => 6, (_, true) => 4, _ => 1 });
        }
    }
}
