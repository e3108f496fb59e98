//! Edge lists: one directed edge a line.
//!
//! ```text
//! # SNAP and KONECT put comments here, with # or %
//! 17 4
//! 4,17
//! 4    99   0.5     1136073600
//! ```
//!
//! Fields are separated by white space or commas. The first two are node ids, any unsigned 64-bit
//! numbers; what follows (weights, times) must be numbers too, and is ignored. Ids are compacted in
//! the order of their first appearance.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io::BufRead;

use super::{Edges, Error, Labels, Lines, Node};

/// Parses a whole edge list.
pub(crate) fn parse<R: BufRead>(mut lines: Lines<'_, R>) -> Result<Edges, Error> {
    let mut list = Vec::new();
    let mut ids = Ids::default();
    while lines.advance()? {
        let line = lines.text()?;
        if line.is_empty() || line.starts_with(['#', '%']) {
            continue;
        }
        let mut fields = line
            .split(|c: char| c == ',' || c.is_whitespace())
            .filter(|field| !field.is_empty());
        let from = lines.number(fields.next(), "a node id")?;
        let to = lines.number(fields.next(), "a second node id")?;
        for rest in fields {
            let _: f64 = lines.number(Some(rest), "a number (a weight or a time)")?;
        }
        let edge = ids.node(from).zip(ids.node(to));
        list.push(edge.ok_or_else(|| lines.malformed("more than 2^32 nodes"))?);
    }
    if list.is_empty() {
        return Err(lines.malformed("no edges"));
    }
    Ok(Edges {
        nr_nodes: ids.of_node.len(),
        list,
        labels: Labels::Id(ids.of_node),
    })
}

/// Node ids as the file has them, numbered as they come.
#[derive(Default)]
struct Ids {
    node_of: HashMap<u64, Node>,
    of_node: Vec<u64>,
}

impl Ids {
    /// The node of this id, a new one if need be; `None` when numbers run out.
    fn node(&mut self, id: u64) -> Option<Node> {
        match self.node_of.entry(id) {
            Entry::Occupied(known) => Some(*known.get()),
            Entry::Vacant(new) => {
                let node = Node::try_from(self.of_node.len()).ok()?;
                self.of_node.push(id);
                Some(*new.insert(node))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn parse(text: &str) -> Result<Edges, String> {
        super::parse(Lines::new(Path::new("web.el"), text.as_bytes())).map_err(|e| e.to_string())
    }

    #[test]
    fn comments_separators_and_sparse_ids() {
        let edges = parse(
            "# head\n% also\n\n17 4\r\n4,17\n4\t, 18446744073709551615\n  17  17 0.5 1136073600\n",
        )
        .unwrap();
        assert_eq!(edges.list, [(0, 1), (1, 0), (1, 2), (0, 0)]);
        assert_eq!(edges.nr_nodes, 3);
        let labels: Vec<_> = (0..3).map(|node| edges.labels.of(node)).collect();
        assert_eq!(labels, ["17", "4", "18446744073709551615"]);
    }

    #[test]
    fn malformed_lines_are_named() {
        for (text, complaint) in [
            ("", "web.el:1: no edges"),
            ("# nothing\n", "web.el:1: no edges"),
            (
                "1 2\n3\n",
                "web.el:2: expected a second node id, found the end of the line",
            ),
            (
                "source,target\n1,2\n",
                "web.el:1: expected a node id, found 'source'",
            ),
            (
                "1 2\n\n1 -2\n",
                "web.el:3: expected a second node id, found '-2'",
            ),
            (
                "1 2 heavy\n",
                "web.el:1: expected a number (a weight or a time), found 'heavy'",
            ),
            (
                "18446744073709551616 1\n",
                "web.el:1: expected a node id, found '18446744073709551616'",
            ),
        ] {
            assert_eq!(parse(text).unwrap_err(), complaint, "{text:?}");
        }
    }
}
