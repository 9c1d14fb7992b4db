//! SVG, readable on light and on dark: colours by `currentColor` and one accent that stands out on
//! both.

use std::fmt::Write;

const HEAD: &str = r#"font-family="system-ui, sans-serif" font-size="13"><style>
svg { color: #24292f } .own { fill: #0b62d6 } .line { stroke: #0b62d6 } .other { stroke: #8f5a00 }
@media (prefers-color-scheme: dark) { svg { color: #d5dae1 } .own { fill: #6aa9ff } .line { stroke: #6aa9ff } .other { stroke: #f0b452 } }
text { fill: currentColor } .quiet { fill: currentColor; opacity: .35 } .axis { stroke: currentColor; opacity: .35 }
</style>
"#;

/// One bar for each; ringpush's stand out.
pub fn bars(title: &str, values: &[(String, f64)]) -> String {
    let (width, left, row) = (760.0, 210.0, 26.0);
    let most = values.iter().map(|(_, value)| *value).fold(f64::MIN_POSITIVE, f64::max);
    let height = 50.0 + row * values.len() as f64;
    let mut out = format!(r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {HEAD}"#);
    let _ = writeln!(out, r#"<text x="10" y="22" font-size="15" font-weight="600">{title}</text>"#);
    for (n, (name, value)) in values.iter().enumerate() {
        let y = 40.0 + row * n as f64;
        let length = value / most * (width - left - 90.0);
        let class = if name.starts_with("ringpush") { "own" } else { "quiet" };
        let shown = if *value >= 100.0 { format!("{value:.0}") } else { format!("{value:.2}") };
        let _ = writeln!(
            out,
            r#"<text x="{}" y="{}" text-anchor="end">{name}</text><rect class="{class}" x="{left}" y="{y}" width="{length:.1}" height="17" rx="2"/><text x="{:.1}" y="{}">{shown}</text>"#,
            left - 8.0,
            y + 13.0,
            left + length + 6.0,
            y + 13.0
        );
    }
    out.push_str("</svg>\n");
    out
}

/// p50 and p99 over time.
pub fn lines(title: &str, series: &[[f64; 3]]) -> String {
    let (width, height, left, top) = (760.0, 300.0, 60.0, 45.0);
    let (right, bottom) = (width - 20.0, height - 40.0);
    let last = series.last().map_or(1.0, |point| point[0].max(1.0));
    let most = series.iter().map(|point| point[2]).fold(1.0, f64::max);
    let x = |t: f64| left + t / last * (right - left);
    let y = |ms: f64| bottom - ms / most * (bottom - top);
    let mut out = format!(r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {HEAD}"#);
    let _ = writeln!(out, r#"<text x="10" y="22" font-size="15" font-weight="600">{title}</text>"#);
    for part in [0.0, 0.5, 1.0] {
        let at = y(most * part);
        let _ = writeln!(
            out,
            r#"<line class="axis" x1="{left}" x2="{right}" y1="{at:.1}" y2="{at:.1}"/><text x="{}" y="{:.1}" text-anchor="end">{:.0}</text>"#,
            left - 6.0,
            at + 4.0,
            most * part
        );
    }
    for (class, column, name) in [("line", 1, "p50"), ("other", 2, "p99")] {
        let points: Vec<String> =
            series.iter().map(|point| format!("{:.1},{:.1}", x(point[0]), y(point[column]))).collect();
        let _ = writeln!(
            out,
            r#"<polyline class="{class}" fill="none" stroke-width="2" points="{}"/>"#,
            points.join(" ")
        );
        if let Some(point) = series.last() {
            let _ = writeln!(
                out,
                r#"<text x="{right}" y="{:.1}" text-anchor="end">{name}</text>"#,
                y(point[column]) - 6.0
            );
        }
    }
    let _ = writeln!(
        out,
        r#"<text x="{right}" y="{}" text-anchor="end">{last:.0} s</text><text x="{left}" y="{}">0</text>"#,
        bottom + 20.0,
        bottom + 20.0
    );
    out.push_str("</svg>\n");
    out
}
