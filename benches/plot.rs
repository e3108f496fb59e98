//! Plots, as SVG.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::report::{Outcome, PEERS, Series, time};

const TITLE: (&str, u32) = ("sans-serif", 17);
const SMALL: (&str, u32) = ("sans-serif", 13);
const OURS: RGBColor = RGBColor(0x1f, 0x6f, 0xb4);
const FLOOR: RGBColor = RGBColor(0x88, 0x88, 0x88);
const TARGET: RGBColor = RGBColor(0xc0, 0x39, 0x2b);
const PEER: RGBColor = RGBColor(0xb0, 0x6a, 0x10);

/// A case in words.
fn words(o: &Outcome) -> String {
    let door = match o.delivery {
        "-" => String::new(),
        door => format!(", {door}"),
    };
    format!("{}{door}, {}", o.name, o.setting.name())
}

fn left(size: u32, colour: &RGBColor) -> TextStyle<'static> {
    ("sans-serif", size)
        .into_font()
        .color(colour)
        .pos(Pos::new(HPos::Left, VPos::Center))
}

/// One bar per case: ours over its floor, the quartiles as a whisker, the target as a mark, and the figure in words.
///
/// # Errors
/// The file could not be written.
pub fn ratios(path: &Path, title: &str, outcomes: &[Outcome]) -> Result<()> {
    let n = outcomes.len();
    // What goes far beyond its target is cut off: the figure says how far it goes.
    let most_of_targets = outcomes
        .iter()
        .filter_map(|o| Some(o.target?.p50))
        .fold(1.0, f64::max);
    let most = outcomes
        .iter()
        .map(|o| o.spread[1].max(o.ratio).min(2.0 * most_of_targets))
        .fold(1.2 * most_of_targets, f64::max);
    let root = SVGBackend::new(path, (1_000, 120 + 24 * n as u32)).into_drawing_area();
    draw(|| {
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root)
            .caption(
                format!("{title}: the time it takes over that of its floor"),
                TITLE,
            )
            .margin(10)
            .x_label_area_size(45)
            .y_label_area_size(440)
            .build_cartesian_2d(0.0..most * 1.2, 0.0..n as f64)?;
        chart
            .configure_mesh()
            .disable_y_mesh()
            .light_line_style(TRANSPARENT)
            .label_style(SMALL)
            .x_desc("1 (grey) is the floor; red marks what was to be reached; whiskers are quartiles of the rounds")
            .y_labels(2 * n + 1)
            .y_label_formatter(&|y| {
                let at = *y - 0.5;
                let whole = at.fract().abs() < 1e-9 && at >= 0.0;
                let o = whole
                    .then(|| outcomes.iter().rev().nth(at as usize))
                    .flatten();
                o.map_or_else(String::new, |o| {
                    format!("{} (over {})", words(o), o.floor_name)
                })
            })
            .draw()?;
        chart.draw_series([PathElement::new(
            [(1.0, 0.0), (1.0, n as f64)],
            FLOOR.stroke_width(1),
        )])?;
        for (i, o) in outcomes.iter().rev().enumerate() {
            let y = i as f64;
            let clip = |x: f64| x.min(most);
            chart.draw_series([Rectangle::new(
                [(0.0, y + 0.2), (clip(o.ratio), y + 0.8)],
                OURS.filled(),
            )])?;
            chart.draw_series([PathElement::new(
                [(clip(o.spread[0]), y + 0.5), (clip(o.spread[1]), y + 0.5)],
                BLACK,
            )])?;
            if let Some(t) = o.target {
                chart.draw_series([PathElement::new(
                    [(t.p50, y + 0.05), (t.p50, y + 0.95)],
                    TARGET.stroke_width(2),
                )])?;
            }
            let colour = if o.met == Some(false) { TARGET } else { BLACK };
            let end = clip(
                o.ratio
                    .max(o.spread[1])
                    .max(o.target.map_or(0.0, |t| t.p50)),
            );
            chart.draw_series([Text::new(
                format!("{:.2}", o.ratio),
                (end + most * 0.012, y + 0.5),
                left(12, &colour),
            )])?;
        }
        root.present()
    })
}

/// What a fault takes, ours and the floors and the peers, on one axis: from the median to the 99th percentile.
///
/// # Errors
/// The file could not be written.
pub fn glance(path: &Path, title: &str, outcomes: &[&Outcome]) -> Result<()> {
    let n = outcomes.len() + PEERS.len();
    let us = |ns: u64| ns.max(1) as f64 / 1e3;
    let root = SVGBackend::new(path, (1_000, 150 + 34 * n as u32)).into_drawing_area();
    draw(|| {
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root)
            .caption(title, TITLE)
            .margin(10)
            .x_label_area_size(45)
            .y_label_area_size(330)
            .build_cartesian_2d((0.5..3_000.0).log_scale(), 0.0..n as f64)?;
        chart
            .configure_mesh()
            .disable_y_mesh()
            .light_line_style(BLACK.mix(0.06))
            .label_style(SMALL)
            .x_labels(8)
            .x_label_formatter(&|us| format!("{us} µs"))
            .x_desc("one fault: a dot at the median, a line to the 99th percentile")
            .y_labels(2 * n + 1)
            .y_label_formatter(&|y| {
                let at = *y - 0.5;
                if at.fract().abs() > 1e-9 || at < 0.0 || at >= n as f64 {
                    return String::new();
                }
                let from_top = n - 1 - at as usize;
                match outcomes.get(from_top) {
                    Some(o) => words(o),
                    None => PEERS[from_top - outcomes.len()].name.to_owned(),
                }
            })
            .draw()?;
        let row = |y: f64, p50: f64, p99: f64, colour: &RGBColor, what: &str| {
            let area = chart.plotting_area();
            area.draw(&PathElement::new(
                [(p50, y), (p99, y)],
                colour.stroke_width(3),
            ))?;
            area.draw(&Circle::new((p50, y), 4, colour.filled()))?;
            area.draw(&Text::new(
                what.to_owned(),
                (p99.max(p50) * 1.08, y),
                left(11, colour),
            ))
        };
        for (i, o) in outcomes.iter().enumerate() {
            let y = (n - 1 - i) as f64;
            let name = format!("{} {}", o.floor_name, time(o.floor.p50));
            row(y + 0.66, us(o.floor.p50), us(o.floor.p99), &FLOOR, &name)?;
            let name = format!("svm {}", time(o.ours.p50));
            row(y + 0.34, us(o.ours.p50), us(o.ours.p99), &OURS, &name)?;
        }
        for (i, peer) in PEERS.iter().enumerate() {
            let y = (PEERS.len() - 1 - i) as f64 + 0.5;
            let (low, high) = peer.p50_us;
            let far = peer.p99_us.map_or(high, |(_, far)| far);
            row(y, low, far, &PEER, peer.figures)?;
        }
        root.present()
    })
}

/// Panels beside each other.
const COLUMNS: usize = 3;
const PANEL: (u32, u32) = (420, 260);
const HEAD: u32 = 40;

/// A figure of `n` panels under a title.
fn panels<'a>(
    path: &'a Path,
    title: &str,
    n: usize,
) -> Result<Vec<DrawingArea<SVGBackend<'a>, Shift>>> {
    let (columns, rows) = (n.clamp(1, COLUMNS), n.div_ceil(COLUMNS));
    let size = (PANEL.0 * columns as u32, HEAD + PANEL.1 * rows as u32);
    let root = SVGBackend::new(path, size).into_drawing_area();
    let titled = || {
        root.fill(&WHITE)?;
        root.titled(title, TITLE)
    };
    let root = titled().map_err(|e| anyhow!("cannot plot: {e}"))?;
    Ok(root.split_evenly((rows, columns)))
}

/// For each case ours against its floor, as cumulative distributions: a panel each, in one file.
///
/// # Errors
/// The file could not be written.
pub fn distributions(path: &Path, title: &str, outcomes: &[&Outcome]) -> Result<()> {
    let areas = panels(path, title, outcomes.len())?;
    draw(|| {
        for (o, area) in outcomes.iter().zip(&areas) {
            let low = o.floor.curve[1].min(o.ours.curve[1]).max(1) as f64;
            // The last percent would be all there is to see.
            let tail = o.floor.curve[196].max(o.ours.curve[196]);
            let high = (tail as f64).min(4.0 * o.floor.p50.max(o.ours.p50) as f64);
            let mut chart = ChartBuilder::on(area)
                .caption(format!("{} {}", o.name, o.delivery), ("sans-serif", 14))
                .margin(8)
                .margin_right(24)
                .x_label_area_size(30)
                .y_label_area_size(40)
                .build_cartesian_2d(low * 0.9..(high * 1.05).max(low * 1.3), 0.0..1.0)?;
            chart
                .configure_mesh()
                .light_line_style(TRANSPARENT)
                .x_labels(5)
                .x_label_formatter(&|ns| time(*ns as u64))
                .y_labels(5)
                .y_label_formatter(&|share| format!("{:.0} %", 100.0 * share))
                .draw()?;
            for (figure, colour, name) in [(&o.floor, FLOOR, o.floor_name), (&o.ours, OURS, "svm")]
            {
                let points = figure
                    .curve
                    .iter()
                    .take(199)
                    .enumerate()
                    .map(|(i, &ns)| (ns as f64, i as f64 / 200.0))
                    .take_while(|point| point.0 <= high * 1.05);
                chart
                    .draw_series(LineSeries::new(points, colour.stroke_width(2)))?
                    .label(format!("{name}, {}", time(figure.p50)))
                    .legend(move |(x, y)| {
                        PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(2))
                    });
            }
            chart
                .configure_series_labels()
                .position(SeriesLabelPosition::LowerRight)
                .border_style(BLACK.mix(0.3))
                .background_style(WHITE)
                .draw()?;
        }
        areas.first().map_or(Ok(()), DrawingArea::present)
    })
}

/// For each series the ratio to the smallest against the size, with quartiles, the target, and the medians in words: a panel each, in
/// one file.
///
/// # Errors
/// The file could not be written.
pub fn curves(path: &Path, title: &str, series: &[&Series]) -> Result<()> {
    let areas = panels(path, title, series.len())?;
    draw(|| {
        for (series, area) in series.iter().zip(&areas) {
            let points = &series.points;
            let most = points
                .iter()
                .map(|p| p.spread[1].max(p.ratio))
                .fold(series.target.unwrap_or(1.0).max(1.5), f64::max);
            let (smallest, largest) = (points[0].x, points[points.len() - 1].x);
            // Room for the words at either end, on a logarithmic scale.
            let margin = (largest / smallest).powf(0.14);
            let (low, high) = (smallest / margin, largest * margin);
            let mut chart = ChartBuilder::on(area)
                .caption(
                    format!("{} … {}", series.name, series.x),
                    ("sans-serif", 14),
                )
                .margin(8)
                .margin_right(16)
                .x_label_area_size(40)
                .y_label_area_size(45)
                .build_cartesian_2d((low..high).log_scale(), 0.0..most * 1.25)?;
            chart
                .configure_mesh()
                .light_line_style(TRANSPARENT)
                .x_labels(6)
                .x_label_formatter(&|x| size(*x))
                .x_desc(series.x)
                .y_labels(6)
                .y_desc("over the smallest")
                .draw()?;
            if let Some(target) = series.target {
                chart.draw_series([PathElement::new(
                    [(low, target), (high, target)],
                    TARGET.stroke_width(1),
                )])?;
            }
            chart.draw_series(LineSeries::new(
                points.iter().map(|p| (p.x, p.ratio)),
                OURS.stroke_width(2),
            ))?;
            for p in points {
                chart.draw_series([PathElement::new(
                    [(p.x, p.spread[0]), (p.x, p.spread[1])],
                    OURS.stroke_width(4),
                )])?;
                chart.draw_series([Circle::new((p.x, p.ratio), 3, OURS.filled())])?;
                let style = ("sans-serif", 12)
                    .into_font()
                    .color(&BLACK)
                    .pos(Pos::new(HPos::Center, VPos::Bottom));
                let above = p.ratio.max(p.spread[1]).max(series.target.unwrap_or(0.0));
                chart.draw_series([Text::new(
                    format!("{} ({})", time(p.p50), size(p.x)),
                    (p.x, above + most * 0.03),
                    style,
                )])?;
            }
        }
        areas.first().map_or(Ok(()), DrawingArea::present)
    })
}

/// A size as a reader likes it.
fn size(x: f64) -> String {
    match x {
        _ if x >= 1e6 => format!("{:.0}·10⁶", x / 1e6),
        _ if x >= 1e5 => format!("{:.0}·10³", x / 1e3),
        _ => format!("{x:.0}"),
    }
}

fn draw<E>(f: impl FnOnce() -> Result<(), DrawingAreaErrorKind<E>>) -> Result<()>
where
    E: std::error::Error + Send + Sync,
{
    f().map_err(|e| anyhow!("cannot plot: {e}"))
}
