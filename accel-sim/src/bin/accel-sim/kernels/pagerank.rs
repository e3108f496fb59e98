//! PageRank by pulling: each node gathers the shares of the nodes that point to it.

use super::{MISSING, Ran};
use crate::graph::CsrMut;
use crate::input::Edges;
use crate::oracle::{PageRank, Ranking};
use crate::report::{Setup, Time, timed};

/// Ranks a graph on the accelerator.
pub(crate) fn run<V>(
    edges: &Edges,
    _settings: &PageRank,
    _setup: &Setup,
    time: &mut Time,
    _verify: impl FnOnce(Ranking<&[f64]>) -> V,
) -> anyhow::Result<Ran<V>> {
    let mut offsets = vec![0; edges.nr_nodes + 1];
    let mut sources = vec![0; edges.list.len()];
    let mut out_degrees = vec![0; edges.nr_nodes];
    timed(&mut time.build, || {
        CsrMut {
            offsets: &mut offsets,
            sources: &mut sources,
            out_degrees: &mut out_degrees,
        }
        .fill(edges);
    });
    anyhow::bail!(MISSING)
}
