//! Plots, as SVG.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use crate::report::{Outcome, Series, time};

const FONT: (&str, u32) = ("sans-serif", 15);
const OURS: RGBColor = RGBColor(0x1f, 0x6f, 0xb4);
const FLOOR: RGBColor = RGBColor(0x99, 0x99, 0x99);
const TARGET: RGBColor = RGBColor(0xc0, 0x39, 0x2b);

/// One bar per case: ours over its floor, the quartiles as a whisker, the target as a mark.
///
/// # Errors
/// The file could not be written.
pub fn ratios(path: &Path, title: &str, outcomes: &[Outcome]) -> Result<()> {
    let n = outcomes.len();
    let most = outcomes
        .iter()
        .map(|o| o.spread[1].max(o.target.map_or(0.0, |t| t.p50)))
        .fold(1.5, f64::max);
    let root = SVGBackend::new(path, (900, 90 + 24 * n as u32)).into_drawing_area();
    draw(|| {
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root)
            .caption(format!("{title}: time over the floor's"), FONT)
            .margin(10)
            .x_label_area_size(30)
            .y_label_area_size(330)
            .build_cartesian_2d(0.0..most * 1.05, 0.0..n as f64)?;
        chart
            .configure_mesh()
            .disable_y_mesh()
            .y_labels(2 * n + 1)
            .y_label_formatter(&|y| {
                let at = *y - 0.5;
                let whole = at.fract().abs() < 1e-9 && at >= 0.0;
                let o = whole
                    .then(|| outcomes.iter().rev().nth(at as usize))
                    .flatten();
                o.map_or_else(String::new, |o| {
                    format!("{} {} {}", o.name, o.delivery, o.setting.name())
                })
            })
            .draw()?;
        for (i, o) in outcomes.iter().rev().enumerate() {
            let y = i as f64;
            chart.draw_series([Rectangle::new(
                [(0.0, y + 0.2), (o.ratio, y + 0.8)],
                OURS.filled(),
            )])?;
            chart.draw_series([PathElement::new(
                [(o.spread[0], y + 0.5), (o.spread[1], y + 0.5)],
                BLACK,
            )])?;
            if let Some(t) = o.target {
                chart.draw_series([PathElement::new(
                    [(t.p50, y + 0.05), (t.p50, y + 0.95)],
                    TARGET.stroke_width(2),
                )])?;
            }
        }
        chart.draw_series([PathElement::new(
            [(1.0, 0.0), (1.0, n as f64)],
            FLOOR.stroke_width(1),
        )])?;
        root.present()
    })
}

/// Panels beside each other.
const COLUMNS: usize = 3;
const PANEL: (u32, u32) = (420, 260);

/// A figure of `n` panels.
fn panels(path: &Path, n: usize) -> DrawingArea<SVGBackend<'_>, plotters::coord::Shift> {
    let (columns, rows) = (n.clamp(1, COLUMNS) as u32, n.div_ceil(COLUMNS) as u32);
    SVGBackend::new(path, (PANEL.0 * columns, PANEL.1 * rows)).into_drawing_area()
}

/// For each case ours against its floor, as cumulative distributions: a panel each, in one file.
///
/// # Errors
/// The file could not be written.
pub fn distributions(path: &Path, outcomes: &[&Outcome]) -> Result<()> {
    let root = panels(path, outcomes.len());
    draw(|| {
        root.fill(&WHITE)?;
        let areas = root.split_evenly((
            outcomes.len().div_ceil(COLUMNS),
            outcomes.len().clamp(1, COLUMNS),
        ));
        for (o, area) in outcomes.iter().zip(&areas) {
            let (low, high) = (
                o.floor.curve[1].min(o.ours.curve[1]).max(1) as f64,
                o.floor.curve[198].max(o.ours.curve[198]) as f64,
            );
            let mut chart = ChartBuilder::on(area)
                .caption(
                    format!("{}, {}, {}", o.name, o.delivery, o.setting.name()),
                    ("sans-serif", 13),
                )
                .margin(8)
                .x_label_area_size(30)
                .y_label_area_size(35)
                .build_cartesian_2d((low * 0.9..high * 1.1).log_scale(), 0.0..1.0)?;
            chart
                .configure_mesh()
                .x_labels(6)
                .x_label_formatter(&|ns| time(*ns as u64))
                .y_labels(6)
                .draw()?;
            for (figure, colour, name) in [(&o.floor, FLOOR, o.floor_name), (&o.ours, OURS, "svm")]
            {
                let points = figure
                    .curve
                    .iter()
                    .take(199)
                    .enumerate()
                    .map(|(i, &ns)| (ns.max(1) as f64, i as f64 / 200.0));
                chart
                    .draw_series(LineSeries::new(points, colour.stroke_width(2)))?
                    .label(name)
                    .legend(move |(x, y)| {
                        PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(2))
                    });
            }
            chart
                .configure_series_labels()
                .position(SeriesLabelPosition::LowerRight)
                .border_style(BLACK)
                .background_style(WHITE)
                .draw()?;
        }
        root.present()
    })
}

/// For each series the ratio to the smallest against the size, with quartiles, the target, and the medians in words: a panel each, in
/// one file.
///
/// # Errors
/// The file could not be written.
pub fn curves(path: &Path, series: &[&Series]) -> Result<()> {
    let root = panels(path, series.len());
    draw(|| {
        root.fill(&WHITE)?;
        let areas = root.split_evenly((
            series.len().div_ceil(COLUMNS),
            series.len().clamp(1, COLUMNS),
        ));
        for (series, area) in series.iter().zip(&areas) {
            let points = &series.points;
            let most = points
                .iter()
                .map(|p| p.spread[1].max(p.ratio))
                .fold(series.target.unwrap_or(1.0).max(1.5), f64::max);
            let (low, high) = (points[0].x * 0.7, points[points.len() - 1].x * 1.8);
            let mut chart = ChartBuilder::on(area)
                .caption(&series.name, ("sans-serif", 13))
                .margin(8)
                .x_label_area_size(35)
                .y_label_area_size(45)
                .build_cartesian_2d((low..high).log_scale(), 0.0..most * 1.2)?;
            chart
                .configure_mesh()
                .x_labels(6)
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
                chart.draw_series([Text::new(
                    time(p.p50),
                    (p.x, p.ratio.max(p.spread[1]) + most * 0.1),
                    ("sans-serif", 11),
                )])?;
            }
        }
        root.present()
    })
}

fn draw<E>(f: impl FnOnce() -> Result<(), DrawingAreaErrorKind<E>>) -> Result<()>
where
    E: std::error::Error + Send + Sync,
{
    f().map_err(|e| anyhow!("cannot plot: {e}"))
}
