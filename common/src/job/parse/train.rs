//! `[train]`.

use super::*;

pub(super) fn train(node: &Node) -> Result<Train> {
    let r = Reader::new(node, "train")?;
    r.only(&[
        "partitions",
        "micro_batch",
        "epochs",
        "steps",
        "loss",
        "optimizer",
        "groups",
        "ema",
        "accumulate",
        "tables",
        "schedule",
        "clip_norm",
        "clip_value",
        "eval_every",
        "early_stopping",
        "top_k",
    ])?;
    let length = match (r.integer("epochs", COUNT)?.optional(), r.integer("steps", COUNT)?.optional()) {
        (Some(n), None) => Length::Epochs(n),
        (None, Some(n)) => Length::Steps(n),
        (Some(_), Some(_)) => {
            return r.refuse("steps", "and `train.epochs` are both given; keep one of them");
        }
        (None, None) => {
            let way_out = "write for example `epochs = 3` or `steps = 2000`";
            return r.error(format!("`train.epochs` or `train.steps` is missing; {way_out}"));
        }
    };
    let loss_default = Loss::CrossEntropy { label_smoothing: 0.0, class_weights: None };
    let optimizer_default = Optimizer::AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 };
    let schedule_default = Schedule { kind: ScheduleKind::Constant, warmup_steps: 0 };
    Ok(Train {
        partitions: r.integer("partitions", 1..=65_536)?.or(8) as u32,
        micro_batch: r.integer("micro_batch", 1..=1_000_000)?.or(16) as usize,
        length,
        loss: r.node("loss").optional().map_or(Ok(loss_default), loss)?,
        optimizer: r.node("optimizer").optional().map_or(Ok(optimizer_default), optimizer)?,
        groups: r.node("groups").optional().map_or(Ok(Vec::new()), groups)?,
        ema: r.f32("ema", &BETWEEN)?.optional(),
        accumulate: r.integer("accumulate", 1..=65_536)?.or(1) as u32,
        tables: r.node("tables").optional().map(tables).transpose()?,
        schedule: r.node("schedule").optional().map_or(Ok(schedule_default), schedule)?,
        clip_norm: r.f32("clip_norm", &POSITIVE)?.optional(),
        clip_value: r.f32("clip_value", &POSITIVE)?.optional(),
        eval_every: r.integer("eval_every", COUNT)?.optional(),
        early_stopping: r.node("early_stopping").optional().map(early_stopping).transpose()?,
        top_k: r.integer("top_k", 2..=1 << 16)?.optional().map(|k| k as u32),
    })
}

const LOSSES: &Kinds = &[
    ("cross-entropy", &["label_smoothing", "class_weights"]),
    ("binary-cross-entropy", &["positive_weight"]),
    ("mse", &[]),
    ("mae", &[]),
    ("huber", &["delta"]),
    ("hinge", &["class_weights"]),
    ("focal", &["gamma", "class_weights"]),
    ("bpr", &[]),
];

fn loss(node: &Node) -> Result<Loss> {
    let names = Names::losses();
    if let Some((name, options)) = added(node, "kind", &names, &[])? {
        return Ok(Loss::Added { name, options });
    }
    choice(node, "loss", "train.loss", &with_added(LOSSES, &names), &[], |name, r| {
        let weight = |k: &Kind| float(k).filter(|v| *v >= 0.0);
        let class_weights = r.list("class_weights", NOT_NEGATIVE.what, weight)?.optional();
        if class_weights.as_ref().is_some_and(|w| w.iter().all(|v| *v == 0.0)) {
            return r.refuse("class_weights", "needs a weight above 0; write one for each class");
        }
        Ok(match name {
            "cross-entropy" => {
                Loss::CrossEntropy { label_smoothing: r.f32("label_smoothing", &FRACTION)?.or(0.0), class_weights }
            }
            "binary-cross-entropy" => {
                Loss::BinaryCrossEntropy { positive_weight: r.f32("positive_weight", &POSITIVE)?.or(1.0) }
            }
            "mse" => Loss::Mse,
            "mae" => Loss::Mae,
            "huber" => Loss::Huber { delta: r.f32("delta", &POSITIVE)?.or(1.0) },
            "hinge" => Loss::Hinge { class_weights },
            "bpr" => Loss::Bpr,
            _ => Loss::Focal { gamma: r.f32("gamma", &NOT_NEGATIVE)?.or(2.0), class_weights },
        })
    })
}

const OPTIMIZERS: &Kinds = &[
    ("adamw", &["beta1", "beta2", "eps"]),
    ("adam", &["beta1", "beta2", "eps"]),
    ("sgd", &["momentum", "dampening", "nesterov"]),
    ("adagrad", &["lr_decay", "eps", "initial_accumulator"]),
    ("lamb", &["beta1", "beta2", "eps"]),
    ("lion", &["beta1", "beta2"]),
    ("rmsprop", &["alpha", "eps", "momentum", "centered"]),
];

fn optimizer(node: &Node) -> Result<Optimizer> {
    choice(node, "optimizer", "train.optimizer", OPTIMIZERS, &["lr", "weight_decay"], |name, r| {
        let lr = |default| Ok(r.f32("lr", &POSITIVE)?.or(default));
        let eps = |default| Ok(r.f32("eps", &POSITIVE)?.or(default));
        let beta = |key, default| Ok(r.f32(key, &FRACTION)?.or(default));
        let momentum = || Ok(r.f32("momentum", &NOT_NEGATIVE)?.or(0.0));
        let weight_decay =
            r.f32("weight_decay", &NOT_NEGATIVE)?.or(if matches!(name, "adamw" | "lamb") { 0.01 } else { 0.0 });
        Ok(match name {
            "adamw" | "adam" => {
                let (lr, beta1, beta2, eps) = (lr(1e-3)?, beta("beta1", 0.9)?, beta("beta2", 0.999)?, eps(1e-8)?);
                if name == "adamw" {
                    Optimizer::AdamW { lr, beta1, beta2, eps, weight_decay }
                } else {
                    Optimizer::Adam { lr, beta1, beta2, eps, weight_decay }
                }
            }
            "sgd" => {
                let (lr, momentum, dampening) = (lr(0.01)?, momentum()?, r.f32("dampening", &ANY)?.or(0.0));
                let nesterov = r.flag("nesterov")?.or(false);
                if nesterov && (momentum == 0.0 || dampening != 0.0) {
                    return r.refuse(
                        "nesterov",
                        "needs `momentum` above 0 and no `dampening`; write for example `momentum = 0.9`",
                    );
                }
                Optimizer::Sgd { lr, momentum, dampening, nesterov, weight_decay }
            }
            "lion" => {
                let (lr, beta1, beta2) = (lr(1e-4)?, beta("beta1", 0.9)?, beta("beta2", 0.99)?);
                Optimizer::Lion { lr, beta1, beta2, weight_decay }
            }
            "lamb" => Optimizer::Lamb {
                lr: lr(1e-3)?,
                beta1: beta("beta1", 0.9)?,
                beta2: beta("beta2", 0.999)?,
                eps: eps(1e-6)?,
                weight_decay,
            },
            "adagrad" => Optimizer::Adagrad {
                lr: lr(0.01)?,
                lr_decay: r.f32("lr_decay", &NOT_NEGATIVE)?.or(0.0),
                eps: eps(1e-10)?,
                weight_decay,
                initial_accumulator: r.f32("initial_accumulator", &NOT_NEGATIVE)?.or(0.0),
            },
            _ => Optimizer::RmsProp {
                lr: lr(0.01)?,
                alpha: beta("alpha", 0.99)?,
                eps: eps(1e-8)?,
                momentum: momentum()?,
                centered: r.flag("centered")?.or(false),
                weight_decay,
            },
        })
    })
}

/// `[{ params = ["biases", "norms"], weight_decay = 0 }]`
fn groups(node: &Node) -> Result<Vec<Group>> {
    let Kind::List(items) = &node.kind else {
        return node.error(format!("`train.groups` must be a list of tables, not {}", node.kind));
    };
    let one = |(i, node): (usize, &Node)| {
        let r = Reader::new(node, format!("train.groups[{i}]"))?;
        r.only(&["params", "lr", "weight_decay"])?;
        let group = Group {
            params: r.list("params", "a text", text)?.needed("params = [\"biases\", \"norms\"]")?,
            lr: r.f32("lr", &NOT_NEGATIVE)?.optional(),
            weight_decay: r.f32("weight_decay", &NOT_NEGATIVE)?.optional(),
        };
        if group.params.is_empty() || group.lr.is_none() && group.weight_decay.is_none() {
            return r.error(format!(
                "`train.groups[{i}]` changes nothing: it needs `params`, and `lr` or `weight_decay` for them"
            ));
        }
        Ok(group)
    };
    items.iter().enumerate().map(one).collect()
}

fn tables(node: &Node) -> Result<Tables> {
    let r = Reader::new(node, "train.tables")?;
    r.only(&["optimizer", "memory_mb"])?;
    let Tables { optimizer, memory } = Tables::default();
    Ok(Tables {
        optimizer: r.node("optimizer").optional().map_or(Ok(optimizer), row_optimizer)?,
        memory: r.integer("memory_mb", 1..=1 << 24)?.or(memory >> 20) << 20,
    })
}

const ROW_OPTIMIZERS: &Kinds = &[
    ("adagrad", &["eps", "initial_accumulator"]),
    ("sgd", &[]),
    ("row-adagrad", &["eps", "initial_accumulator"]),
    ("lazy-adam", &["beta1", "beta2", "eps"]),
    ("ftrl", &["beta", "l1", "l2"]),
];

fn row_optimizer(node: &Node) -> Result<RowOptimizer> {
    choice(node, "optimizer", "train.tables.optimizer", ROW_OPTIMIZERS, &["lr"], |name, r| {
        let value = |key, range, default| Ok(r.f32(key, range)?.or(default));
        let accumulator = || value("initial_accumulator", &NOT_NEGATIVE, 0.0);
        let lr = |default| value("lr", &POSITIVE, default);
        Ok(match name {
            "sgd" => RowOptimizer::Sgd { lr: lr(0.01)? },
            "row-adagrad" => RowOptimizer::RowAdagrad {
                lr: lr(0.01)?,
                eps: value("eps", &POSITIVE, 1e-10)?,
                initial_accumulator: accumulator()?,
            },
            "lazy-adam" => RowOptimizer::LazyAdam {
                lr: lr(1e-3)?,
                beta1: value("beta1", &FRACTION, 0.9)?,
                beta2: value("beta2", &FRACTION, 0.999)?,
                eps: value("eps", &POSITIVE, 1e-8)?,
            },
            "ftrl" => RowOptimizer::Ftrl {
                lr: lr(0.05)?,
                beta: value("beta", &NOT_NEGATIVE, 1.0)?,
                l1: value("l1", &NOT_NEGATIVE, 0.0)?,
                l2: value("l2", &NOT_NEGATIVE, 0.0)?,
            },
            _ => RowOptimizer::Adagrad {
                lr: lr(0.01)?,
                eps: value("eps", &POSITIVE, 1e-10)?,
                initial_accumulator: accumulator()?,
            },
        })
    })
}

const SCHEDULES: &Kinds = &[
    ("constant", &[]),
    ("step", &["every", "gamma"]),
    ("multi-step", &["milestones", "gamma"]),
    ("exponential", &["gamma"]),
    ("cosine", &["min_factor"]),
    ("linear", &["end_factor"]),
    ("polynomial", &["power", "end_factor"]),
    ("one-cycle", &["start_fraction", "div_factor", "final_div_factor"]),
    ("inverse-sqrt", &[]),
    ("plateau", &["factor", "patience", "threshold", "metric"]),
];

fn schedule(node: &Node) -> Result<Schedule> {
    choice(node, "schedule", "train.schedule", SCHEDULES, &["warmup_steps"], |name, r| {
        let value = |key, default, range| Ok(r.f64(key, range)?.or(default));
        let gamma = || value("gamma", 0.1, &POSITIVE);
        let kind = match name {
            "constant" => ScheduleKind::Constant,
            "step" => ScheduleKind::Step { every: r.integer("every", COUNT)?.needed("every = 1000")?, gamma: gamma()? },
            "multi-step" => {
                let step = |k: &Kind| whole(k).filter(|n| COUNT.contains(n));
                let milestones = r.list("milestones", "the number of a step, from 1 on", step)?;
                ScheduleKind::MultiStep { milestones: milestones.needed("milestones = [1000, 2000]")?, gamma: gamma()? }
            }
            "exponential" => ScheduleKind::Exponential { gamma: r.f64("gamma", &POSITIVE)?.needed("gamma = 0.999")? },
            "cosine" => ScheduleKind::Cosine { min_factor: value("min_factor", 0.0, &NOT_NEGATIVE)? },
            "linear" => ScheduleKind::Linear { end_factor: value("end_factor", 0.0, &NOT_NEGATIVE)? },
            "polynomial" => ScheduleKind::Polynomial {
                power: value("power", 1.0, &POSITIVE)?,
                end_factor: value("end_factor", 0.0, &NOT_NEGATIVE)?,
            },
            "one-cycle" => ScheduleKind::OneCycle {
                start_fraction: value("start_fraction", 0.3, &BETWEEN)?,
                div_factor: value("div_factor", 25.0, &POSITIVE)?,
                final_div_factor: value("final_div_factor", 1e4, &POSITIVE)?,
            },
            "inverse-sqrt" => ScheduleKind::InverseSqrt,
            _ => ScheduleKind::Plateau {
                factor: value("factor", 0.1, &BETWEEN)?,
                patience: r.integer("patience", COUNT_OR_0)?.or(10),
                threshold: value("threshold", 1e-4, &NOT_NEGATIVE)?,
                metric: metric(r)?,
            },
        };
        Ok(Schedule { kind, warmup_steps: r.integer("warmup_steps", COUNT_OR_0)?.or(0) })
    })
}

fn metric(r: &Reader<'_>) -> Result<Metric> {
    let name = r.word("metric", "metric", &Metric::ALL.map(Metric::name))?.or(Metric::ALL[0].name());
    Ok(Metric::ALL.into_iter().find(|metric| metric.name() == name).unwrap_or(Metric::ALL[0]))
}

fn early_stopping(node: &Node) -> Result<EarlyStopping> {
    let r = Reader::new(node, "train.early_stopping")?;
    r.only(&["metric", "patience", "min_delta"])?;
    Ok(EarlyStopping {
        metric: metric(&r)?,
        patience: r.integer("patience", COUNT_OR_0)?.needed("patience = 3")?,
        min_delta: r.f64("min_delta", &NOT_NEGATIVE)?.or(0.0),
    })
}
