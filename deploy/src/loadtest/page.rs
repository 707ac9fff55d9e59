//! A load test as one page with everything in it: readable in light and dark, and without a network.

use super::figures::{Churn, Quantiles, Size};
use super::report::Report;
use anyhow::{Result, anyhow};
use plotters::prelude::*;
use std::fmt::Write;

/// Colours that stand for those of the page, which the reader's system chooses.
const INK: RGBColor = RGBColor(1, 1, 1);
const GRID: RGBColor = RGBColor(2, 2, 2);

const STYLE: &str = "
:root { color-scheme: light dark; --grid: #0002; }
@media (prefers-color-scheme: dark) { :root { --grid: #fff3; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--grid); }
th:last-child, td:last-child { text-align: left; }
td { white-space: nowrap; }
figure { margin: 0; }
.wide { overflow-x: auto; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(28rem, 1fr)); gap: 1rem; }
svg { width: 100%; height: auto; }
";

type Points = Vec<(f64, f64)>;

/// A line of a plot.
struct Line<'a> {
    name: &'a str,
    colour: RGBColor,
    points: Points,
}

const BLUE: RGBColor = RGBColor(47, 126, 216);
const ORANGE: RGBColor = RGBColor(224, 122, 48);
const GREEN: RGBColor = RGBColor(46, 160, 103);
const GREY: RGBColor = RGBColor(140, 140, 140);
/// For the eight phases of a step.
const PHASES: [RGBColor; 8] = [
    RGBColor(120, 120, 200),
    BLUE,
    RGBColor(90, 170, 220),
    RGBColor(180, 120, 200),
    ORANGE,
    GREEN,
    RGBColor(120, 190, 90),
    GREY,
];

/// The page.
pub fn page(report: &Report<'_>) -> Result<String> {
    let title = format!("How {} scales", report.job.name);
    let mut body = format!("<h1>{}</h1>\n<p>{}</p>\n", escape(&title), escape(&report.about()));
    for (name, what) in [
        ("strong", "Strong scaling: the job's partitions, shared by more workers"),
        ("weak", "Weak scaling: as many partitions for each worker, however many there are"),
    ] {
        let sizes = report.scaled(name);
        if sizes.is_empty() {
            continue;
        }
        write!(body, "<h2>{what}</h2>\n{}<div class=\"plots\">\n", table(&sizes))?;
        for plot in plots(&sizes)? {
            writeln!(body, "<figure>{plot}</figure>")?;
        }
        body += "</div>\n";
        if sizes.iter().any(|size| size.churn.is_some()) {
            body += &churn(&sizes);
        }
    }
    Ok(format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" \
         content=\"width=device-width, initial-scale=1\">\n<title>{}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}</body>\n\
         </html>\n",
        escape(&title)
    ))
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn rows(head: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let line = |cells: &mut dyn Iterator<Item = String>, tag: &str| {
        let cells: String = cells.map(|cell| format!("<{tag}>{}</{tag}>", escape(&cell))).collect();
        format!("<tr>{cells}</tr>\n")
    };
    let head = line(&mut head.iter().map(|cell| cell.to_string()), "th");
    let rows: String = rows.map(|row| line(&mut row.into_iter(), "td")).collect();
    format!("<div class=\"wide\"><table>\n<thead>{head}</thead>\n<tbody>\n{rows}</tbody>\n</table></div>\n")
}

fn table(sizes: &[&Size]) -> String {
    let head = [
        "workers",
        "partitions",
        "samples/s",
        "predicted",
        "efficiency",
        "step p50, ms",
        "p99, ms",
        "MB/s in",
        "MB/s out",
        "coordinator, cores",
        "µs a worker and step",
        "beyond bytes",
        "MiB",
        "held up by",
    ];
    let row = |size: &&Size| {
        vec![
            size.workers.to_string(),
            size.partitions.to_string(),
            format!("{:.0}", size.samples_per_second),
            match size.predicted {
                Some(rate) if size.calibrates => format!("{rate:.0} (calibrates)"),
                Some(rate) => format!("{rate:.0}"),
                None => "".into(),
            },
            format!("{:.0}%", size.efficiency * 100.0),
            format!("{:.2}", size.step_ms.p50),
            format!("{:.2}", size.step_ms.p99),
            format!("{:.1}", size.bytes_pushed_per_second / 1e6),
            format!("{:.1}", size.bytes_pulled_per_second / 1e6),
            format!("{:.2}", size.busy.coordinator),
            format!("{:.0}", size.coordinator_us),
            size.own_us.map_or("-".into(), |us| format!("{us:.0}")),
            format!("{:.0}", size.coordinator_memory_mib),
            size.bottleneck.text().into(),
        ]
    };
    rows(&head, sizes.iter().map(row))
}

fn churn(sizes: &[&Size]) -> String {
    let head = [
        "workers",
        "joins",
        "samples/s",
        "first gradient p50, ms",
        "p99",
        "max",
        "next step after a loss p50, ms",
        "p99",
        "max",
        "step at a moment p50, ms",
        "p99",
        "max",
    ];
    let row = |(size, churn): (&Size, &Churn)| {
        let three = |q: &Option<Quantiles>| match q {
            Some(q) => [q.p50, q.p99, q.max].map(|ms| format!("{ms:.1}")),
            None => ["-", "-", "-"].map(String::from),
        };
        let [join, leave, step] = [&churn.join_ms, &churn.leave_ms, &churn.step_ms].map(three);
        let first = [size.workers.to_string(), churn.joins.to_string(), format!("{:.0}", churn.samples_per_second)];
        [first, join, leave, step].concat()
    };
    let rows = rows(&head, sizes.iter().filter_map(|size| Some((*size, size.churn.as_ref()?))).map(row));
    format!(
        "<h3>While workers come and go</h3>\n<p>At times that were set beforehand, so that a stall spares none of them. A step counts for \
         each moment that lies in it: a long one is not one among many.</p>\n{rows}"
    )
}

fn plots(sizes: &[&Size]) -> Result<Vec<String>> {
    let of = |value: &dyn Fn(&Size) -> f64| -> Points { sizes.iter().map(|s| (s.workers as f64, value(s))).collect() };
    let line = |name, colour, value: &dyn Fn(&Size) -> f64| Line { name, colour, points: of(value) };
    let first = sizes[0];
    let ideal = |size: &Size| first.samples_per_second * size.workers as f64 / first.workers as f64;
    let mut rates = vec![line("ideal", GREY, &ideal), line("measured", BLUE, &|s| s.samples_per_second)];
    if sizes.iter().all(|size| size.predicted.is_some()) {
        rates.insert(1, line("predicted", ORANGE, &|s| s.predicted.unwrap_or_default()));
    }
    Ok(vec![
        lines("Samples a second", &rates, true)?,
        lines("Efficiency, %", &[line("measured", BLUE, &|s| s.efficiency * 100.0)], false)?,
        lines(
            "Time of a step, ms",
            &[line("p50", BLUE, &|s| s.step_ms.p50), line("p99", ORANGE, &|s| s.step_ms.p99)],
            true,
        )?,
        stacked("Where a step's time goes, %", sizes)?,
        lines(
            "Busy cores",
            &[line("coordinator", ORANGE, &|s| s.busy.coordinator), line("workers", BLUE, &|s| s.busy.workers)],
            false,
        )?,
        lines("The coordinator's memory, MiB", &[line("most", GREEN, &|s| s.coordinator_memory_mib)], false)?,
    ])
}

/// Takes the page's colours for those that stand for them.
fn themed(svg: String) -> String {
    svg.replace("#010101", "currentColor").replace("#020202", "var(--grid)")
}

const SIDES: (u32, u32) = (520, 340);

fn failed(e: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("cannot draw a plot: {e}")
}

/// Lines over the number of workers, which doubles from mark to mark.
fn lines(title: &str, lines: &[Line<'_>], log: bool) -> Result<String> {
    let all = || lines.iter().flat_map(|line| &line.points);
    let xs = all().map(|p| p.0).fold((f64::INFINITY, 0.0), |(lo, hi): (f64, f64), x| (lo.min(x), hi.max(x)));
    let ys = all().map(|p| p.1).fold((f64::INFINITY, 0.0), |(lo, hi): (f64, f64), y| (lo.min(y), hi.max(y)));
    let top = if ys.1 > 0.0 { ys.1 * 1.1 } else { 1.0 };
    let xs = (xs.0 * 0.9..xs.1 * 1.1).log_scale().base(2.0);
    let mut svg = String::new();
    if log {
        draw(&mut svg, title, lines, xs, (ys.0.max(top * 1e-6) * 0.8..top).log_scale())?;
    } else {
        draw(&mut svg, title, lines, xs, 0.0..top)?;
    }
    Ok(themed(svg))
}

fn draw<X, Y>(svg: &mut String, title: &str, lines: &[Line<'_>], xs: X, ys: Y) -> Result<()>
where
    X: plotters::coord::ranged1d::AsRangedCoord<Value = f64>,
    Y: plotters::coord::ranged1d::AsRangedCoord<Value = f64>,
    X::CoordDescType: plotters::coord::ranged1d::ValueFormatter<f64>,
    Y::CoordDescType: plotters::coord::ranged1d::ValueFormatter<f64>,
{
    let root = SVGBackend::with_string(svg, SIDES).into_drawing_area();
    let font = |size: u32| ("sans-serif", size).into_font().color(&INK);
    let mut chart = ChartBuilder::on(&root)
        .caption(title, font(17))
        .margin(12)
        .x_label_area_size(38)
        .y_label_area_size(64)
        .build_cartesian_2d(xs, ys)
        .map_err(failed)?;
    let number = |v: &f64| if *v >= 10.0 || v.fract() == 0.0 { format!("{v:.0}") } else { format!("{v:.2}") };
    chart
        .configure_mesh()
        .axis_style(INK)
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .label_style(font(13))
        .axis_desc_style(font(13))
        .x_desc("workers")
        .y_labels(6)
        .x_label_formatter(&number)
        .y_label_formatter(&number)
        .draw()
        .map_err(failed)?;
    for Line { name, colour, points } in lines {
        let series = LineSeries::new(points.iter().copied(), colour.stroke_width(2)).point_size(3);
        let drawn = chart.draw_series(series).map_err(failed)?;
        let colour = *colour;
        drawn.label(*name).legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(2)));
    }
    if lines.len() > 1 {
        chart
            .configure_series_labels()
            .label_font(font(13))
            .border_style(TRANSPARENT)
            .position(SeriesLabelPosition::UpperLeft)
            .draw()
            .map_err(failed)?;
    }
    root.present().map_err(failed)?;
    drop(chart);
    Ok(())
}

/// A bar for each number of workers, in which each phase of a step has its share.
fn stacked(title: &str, sizes: &[&Size]) -> Result<String> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIDES).into_drawing_area();
        let font = |size: u32| ("sans-serif", size).into_font().color(&INK);
        let mut chart = ChartBuilder::on(&root)
            .caption(title, font(17))
            .margin(12)
            .margin_right(110)
            .x_label_area_size(38)
            .y_label_area_size(64)
            .build_cartesian_2d(0.0..sizes.len() as f64, 0.0..100.0)
            .map_err(failed)?;
        // A mark in the middle of each bar.
        let workers = |x: &f64| {
            let bar = sizes.get(x.floor() as usize).filter(|_| (x.fract() - 0.5).abs() < 0.01);
            bar.map(|size| size.workers.to_string()).unwrap_or_default()
        };
        chart
            .configure_mesh()
            .axis_style(INK)
            .bold_line_style(GRID)
            .light_line_style(TRANSPARENT)
            .disable_x_mesh()
            .label_style(font(13))
            .axis_desc_style(font(13))
            .x_desc("workers")
            .x_labels(2 * sizes.len() + 1)
            .x_label_formatter(&workers)
            .y_label_formatter(&|v| format!("{v:.0}"))
            .draw()
            .map_err(failed)?;
        let each: Vec<_> = sizes.iter().map(|size| size.phases.each()).collect();
        let bars = each.iter().enumerate().flat_map(|(at, phases)| {
            let all: f64 = phases.iter().map(|phase| phase.1).sum();
            let mut low = 0.0;
            phases.iter().zip(PHASES).map(move |((_, ms), colour)| {
                let high = low + ms / all.max(f64::MIN_POSITIVE) * 100.0;
                let bar = Rectangle::new([(at as f64 + 0.15, low), (at as f64 + 0.85, high)], colour.filled());
                low = high;
                bar
            })
        });
        chart.draw_series(bars).map_err(failed)?;
        for (i, ((name, _), colour)) in each[0].iter().zip(PHASES).enumerate() {
            let (x, y) = (SIDES.0 as i32 - 108, 50 + 22 * i as i32);
            root.draw(&Rectangle::new([(x, y), (x + 12, y + 12)], colour.filled())).map_err(failed)?;
            root.draw(&Text::new(*name, (x + 18, y), font(13))).map_err(failed)?;
        }
        root.present().map_err(failed)?;
    }
    Ok(themed(svg))
}
