//! Matrix Market, coordinate format: the file format of the SuiteSparse collection.
//!
//! ```text
//! %%MatrixMarket matrix coordinate pattern symmetric
//! % comments
//! 3 3 2          rows, columns, entries
//! 1 1            row, column (from 1), and a value unless the field is `pattern`
//! 3 2
//! ```
//!
//! A graph is a square matrix; an entry (i, j) is an edge from i to j. A symmetric file stores one
//! triangle, so each entry off the diagonal is two edges. Values are checked and ignored: ranks
//! here are those of the structure.

use std::io::BufRead;

use super::{Edges, Error, Labels, Lines, Node, excerpt, graph_fits_memory};

/// How a file begins.
pub(crate) const BANNER: &str = "%%MatrixMarket";

/// What kind of number follows an entry's position.
#[derive(Clone, Copy, PartialEq)]
enum Field {
    Pattern,
    Real,
    Integer,
}

/// Which entries the file leaves out.
#[derive(Clone, Copy, PartialEq)]
enum Symmetry {
    General,
    Symmetric,
}

/// Parses a whole file.
pub(crate) fn parse<R: BufRead>(mut lines: Lines<'_, R>) -> Result<Edges, Error> {
    let (field, symmetry) = banner(&mut lines)?;
    let (nr_nodes, nr_entries) = size(&mut lines)?;

    // The count in the header is a claim: room is taken for it only up to a point, then as entries
    // really come.
    const TRUSTED: u64 = 1 << 20;
    let mut list: Vec<(Node, Node)> = Vec::with_capacity(nr_entries.min(TRUSTED) as usize);
    let mut seen = 0;
    while lines.advance()? {
        let line = lines.text()?;
        if line.is_empty() || line.starts_with('%') {
            continue;
        }
        if seen == nr_entries {
            return Err(lines.malformed(format!("an entry more than the {nr_entries} announced")));
        }
        let mut fields = line.split_ascii_whitespace();
        let row = index(&lines, fields.next(), "a row", nr_nodes)?;
        let column = index(&lines, fields.next(), "a column", nr_nodes)?;
        match field {
            Field::Pattern => {}
            Field::Real => _ = lines.number::<f64>(fields.next(), "a real value")?,
            Field::Integer => _ = lines.number::<i64>(fields.next(), "an integer value")?,
        }
        if let Some(extra) = fields.next() {
            return Err(lines.malformed(format!("'{}' after the end of an entry", excerpt(extra))));
        }
        list.push((row, column));
        if symmetry == Symmetry::Symmetric && row != column {
            list.push((column, row));
        }
        seen += 1;
    }
    if seen < nr_entries {
        return Err(lines.malformed(format!(
            "the file ends after {seen} of the {nr_entries} entries announced"
        )));
    }
    Ok(Edges {
        nr_nodes: nr_nodes as usize,
        list,
        labels: Labels::Position(1),
    })
}

/// Reads `%%MatrixMarket matrix coordinate FIELD SYMMETRY`, of which all but the first word may be
/// in any case.
fn banner<R: BufRead>(lines: &mut Lines<'_, R>) -> Result<(Field, Symmetry), Error> {
    let missing = format!("expected '{BANNER} matrix coordinate <field> <symmetry>'");
    if !lines.advance()? {
        return Err(lines.malformed(missing));
    }
    let line = lines.text()?.to_ascii_lowercase();
    let words: Vec<&str> = line.split_ascii_whitespace().collect();
    let [banner, object, layout, field, symmetry] = words[..] else {
        return Err(lines.malformed(missing));
    };
    if banner != BANNER.to_ascii_lowercase() {
        return Err(lines.malformed(missing));
    }
    let refuse = |what: &str, word: &str, known: &str| {
        Err(lines.malformed(format!(
            "{what} '{}' is not supported ({known})",
            excerpt(word)
        )))
    };
    if object != "matrix" {
        return refuse("object", object, "matrix");
    }
    if layout != "coordinate" {
        return refuse("layout", layout, "coordinate");
    }
    let field = match field {
        "pattern" => Field::Pattern,
        "real" => Field::Real,
        "integer" => Field::Integer,
        other => return refuse("field", other, "pattern, real, integer"),
    };
    let symmetry = match symmetry {
        "general" => Symmetry::General,
        "symmetric" => Symmetry::Symmetric,
        other => return refuse("symmetry", other, "general, symmetric"),
    };
    Ok((field, symmetry))
}

/// Reads the line `rows columns entries`: the number of nodes and of entries.
fn size<R: BufRead>(lines: &mut Lines<'_, R>) -> Result<(Node, u64), Error> {
    while lines.advance()? {
        let line = lines.text()?;
        if line.is_empty() || line.starts_with('%') {
            continue;
        }
        let mut fields = line.split_ascii_whitespace();
        let rows: Node = lines.number(fields.next(), "the number of rows (below 2^32)")?;
        let columns: Node = lines.number(fields.next(), "the number of columns (below 2^32)")?;
        let entries = lines.number(fields.next(), "the number of entries")?;
        if let Some(extra) = fields.next() {
            return Err(
                lines.malformed(format!("'{}' after the size of the matrix", excerpt(extra)))
            );
        }
        if rows != columns {
            return Err(lines.malformed(format!(
                "a graph is a square matrix; this one is {rows} x {columns}"
            )));
        }
        if rows == 0 {
            return Err(lines.malformed("an empty matrix"));
        }
        if !graph_fits_memory(u64::from(rows), entries) {
            return Err(Error::TooLarge {
                what: format!(
                    "{}: {rows} nodes and {entries} entries",
                    lines.path.display()
                ),
            });
        }
        return Ok((rows, entries));
    }
    Err(lines.malformed("the file ends before the size of the matrix"))
}

/// Reads a row or column number, which counts from 1, as a node, which counts from 0.
fn index<R: BufRead>(
    lines: &Lines<'_, R>,
    field: Option<&str>,
    what: &str,
    nr_nodes: Node,
) -> Result<Node, Error> {
    let index: u64 = lines.number(field, &format!("{what} number"))?;
    if index == 0 || index > u64::from(nr_nodes) {
        return Err(lines.malformed(format!("{what} number {index} is outside 1..={nr_nodes}")));
    }
    Ok((index - 1) as Node)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn parse(text: &str) -> Result<Edges, String> {
        super::parse(Lines::new(Path::new("a.mtx"), text.as_bytes())).map_err(|e| e.to_string())
    }

    #[test]
    fn a_general_pattern() {
        let edges = parse(
            "%%MatrixMarket matrix coordinate pattern general\n% c\n\n3 3 2\n1 2\n% c\n3 3\n",
        )
        .unwrap();
        assert_eq!(
            (edges.nr_nodes, &edges.list[..]),
            (3, &[(0, 1), (2, 2)][..])
        );
        assert_eq!(edges.labels.of(2), "3");
    }

    #[test]
    fn a_symmetric_entry_is_two_edges_but_on_the_diagonal() {
        let edges = parse(
            "%%matrixmarket MATRIX Coordinate Real Symmetric\n3 3 3\n2 1 -1e-3\n2 2 4\n3 1 0.5\n",
        )
        .unwrap();
        assert_eq!(edges.list, [(1, 0), (0, 1), (1, 1), (2, 0), (0, 2)]);
    }

    #[test]
    fn what_a_header_claims_is_not_tried() {
        let header = "%%MatrixMarket matrix coordinate pattern general\n";
        let error = parse(&format!("{header}3 3 18446744073709551615\n")).unwrap_err();
        let complaint = "a.mtx: 3 nodes and 18446744073709551615 entries: too large for the memory of this machine";
        assert_eq!(error, complaint);
    }

    #[test]
    fn integers() {
        let edges =
            parse("%%MatrixMarket matrix coordinate integer general\n2 2 1\n2 1 -7\n").unwrap();
        assert_eq!(edges.list, [(1, 0)]);
    }

    #[test]
    fn malformed_files_are_named_by_line() {
        const PATTERN: &str = "%%MatrixMarket matrix coordinate pattern general\n";
        const REAL: &str = "%%MatrixMarket matrix coordinate real general\n";
        const INTEGER: &str = "%%MatrixMarket matrix coordinate integer general\n";
        let expected = "expected '%%MatrixMarket matrix coordinate <field> <symmetry>'";
        for (header, body, complaint) in [
            ("", "", format!("1: {expected}")),
            ("", "3 3 1\n1 1\n", format!("1: {expected}")),
            (
                "%%MatrixMarket matrix coordinate\n",
                "",
                format!("1: {expected}"),
            ),
            (
                "%%MatrixMarket matrix array real general\n",
                "",
                "1: layout 'array' is not supported (coordinate)".into(),
            ),
            (
                "%%MatrixMarket matrix coordinate complex general\n",
                "",
                "1: field 'complex' is not supported (pattern, real, integer)".into(),
            ),
            (
                "%%MatrixMarket matrix coordinate real hermitian\n",
                "",
                "1: symmetry 'hermitian' is not supported (general, symmetric)".into(),
            ),
            (
                PATTERN,
                "% c\n",
                "2: the file ends before the size of the matrix".into(),
            ),
            (
                PATTERN,
                "3 4 1\n1 1\n",
                "2: a graph is a square matrix; this one is 3 x 4".into(),
            ),
            (PATTERN, "0 0 0\n", "2: an empty matrix".into()),
            (
                PATTERN,
                "3 3\n",
                "2: expected the number of entries, found the end of the line".into(),
            ),
            (
                PATTERN,
                "3 3 1 1\n",
                "2: '1' after the size of the matrix".into(),
            ),
            (
                PATTERN,
                "4294967296 4294967296 0\n",
                "2: expected the number of rows (below 2^32), found '4294967296'".into(),
            ),
            (
                PATTERN,
                "3 3 1\n0 1\n",
                "3: a row number 0 is outside 1..=3".into(),
            ),
            (
                PATTERN,
                "3 3 1\n1 4\n",
                "3: a column number 4 is outside 1..=3".into(),
            ),
            (
                PATTERN,
                "3 3 1\n1 x\n",
                "3: expected a column number, found 'x'".into(),
            ),
            (
                PATTERN,
                "3 3 1\n1 1 1\n",
                "3: '1' after the end of an entry".into(),
            ),
            (
                PATTERN,
                "3 3 2\n1 1\n",
                "3: the file ends after 1 of the 2 entries announced".into(),
            ),
            (
                PATTERN,
                "3 3 1\n1 1\n\n2 2\n",
                "5: an entry more than the 1 announced".into(),
            ),
            (
                PATTERN,
                "3 3 3000000\n",
                "2: the file ends after 0 of the 3000000 entries announced".into(),
            ),
            (
                REAL,
                "3 3 1\n1 1\n",
                "3: expected a real value, found the end of the line".into(),
            ),
            (
                INTEGER,
                "3 3 1\n1 1 0.5\n",
                "3: expected an integer value, found '0.5'".into(),
            ),
        ] {
            let text = format!("{header}{body}");
            assert_eq!(
                parse(&text).unwrap_err(),
                format!("a.mtx:{complaint}"),
                "{text:?}"
            );
        }
    }
}
