//! PageRank by pulling: each node gathers the shares of the nodes that point to it.
//!
//! The graph is in shared memory twice, and iterations alternate between the two, so that the
//! result is right only if both are:
//!
//! ```text
//! linked   nodes: [Node]   a node heads the list of its in-edges …
//!          links: [Link]   … whose members point to the source node and to the next in-edge
//! CSR      offsets: [u64]  the in-edges of node v are sources[offsets[v]..offsets[v + 1]]
//!          sources: [u32]
//! ```
//!
//! Pointers are plain addresses, the same on both sides: the CPU writes them, the device follows
//! them. An iteration is two launches:
//!
//! 1. *pull*, by element: `next[v]` gathers the shares of all sources of `v`;
//! 2. *advance*, over slices: `next` becomes the ranks, each rank is split into shares, and what
//!    moved and what dangles is summed up.

use std::sync::{Mutex, PoisonError};

use accel_sim::Accelerator;
use bytemuck::{Pod, Zeroable};
use svm::{Buffer, Ptr};

use super::{Ran, accelerator, counters, mirroring};
use crate::graph::CsrMut;
use crate::input::{Edges, Node as Index};
use crate::oracle::{PageRank, Ranking};
use crate::report::{Setup, Time, timed};

/// A node of the linked graph.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Node {
    rank: f64,
    /// What each out-edge carries: the rank, split evenly.
    share: f64,
    /// 0 marks a dangling node.
    out_degree: u64,
    /// The list of its in-edges; null if there are none.
    in_edges: Ptr<Link>,
}

/// An in-edge, in the list of the node it leads to.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Link {
    from: Ptr<Node>,
    next: Ptr<Link>,
}

/// The graph in memory that both sides share.
struct Shared {
    nodes: Buffer<Node>,
    links: Buffer<Link>,
    offsets: Buffer<u64>,
    sources: Buffer<Index>,
    next: Buffer<f64>,
}

impl Shared {
    fn stats(&self) -> [svm::Stats; 5] {
        [
            self.nodes.stats(),
            self.links.stats(),
            self.offsets.stats(),
            self.sources.stats(),
            self.next.stats(),
        ]
    }
}

/// Sums over all nodes, gathered chunk by chunk.
#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    /// The ranks of dangling nodes.
    dangling: f64,
    /// How far all ranks moved.
    moved: f64,
}

/// Ranks a graph on the accelerator.
pub(crate) fn run<V>(
    edges: &Edges,
    settings: &PageRank,
    setup: &Setup,
    time: &mut Time,
    verify: impl FnOnce(Ranking<&[f64]>) -> V,
) -> anyhow::Result<Ran<V>> {
    let accel = accelerator(setup)?;
    let mut shared = timed(&mut time.build, || build(edges, &mirroring(setup)))?;
    let (iterations, residual) =
        timed(&mut time.kernel, || iterate(&accel, &mut shared, settings))?;
    timed(&mut time.verify, || {
        // Read where they lie: this is what brings them home.
        let ranks: Vec<f64> = shared
            .nodes
            .as_slice()
            .iter()
            .map(|node| node.rank)
            .collect();
        let verdict = verify(Ranking {
            ranks: &ranks,
            iterations,
            residual,
        });
        Ok(Ran {
            verdict,
            counters: counters(&accel, &shared.stats()),
        })
    })
}

/// Lays the graph out, every rank the same.
fn build(edges: &Edges, options: &svm::Options) -> Result<Shared, svm::Error> {
    let n = edges.nr_nodes;
    let mut nodes = Buffer::<Node>::with_options(n, options)?;
    let mut links = Buffer::<Link>::with_options(edges.list.len(), options)?;
    let mut offsets = Buffer::<u64>::with_options(n + 1, options)?;
    let mut sources = Buffer::<Index>::with_options(edges.list.len(), options)?;
    let next = Buffer::<f64>::with_options(n, options)?;

    let mut out_degrees = vec![0; n];
    CsrMut {
        offsets: offsets.as_mut_slice(),
        sources: sources.as_mut_slice(),
        out_degrees: &mut out_degrees,
    }
    .fill(edges);

    // A node's in-edges are linked in the order of the CSR, so that following them is no jumping
    // about: what jumps is `from`.
    let (node_at, link_at) = (ptrs(nodes.as_slice()), ptrs(links.as_slice()));
    let (links_mut, offsets_of) = (links.as_mut_slice(), offsets.as_slice().windows(2));
    let headed = nodes.as_mut_slice().iter_mut().zip(&out_degrees);
    for ((node, &out_degree), ends) in headed.zip(offsets_of) {
        let run = ends[0] as usize..ends[1] as usize;
        let mut next = Ptr::null();
        for i in run.rev() {
            links_mut[i] = Link {
                from: node_at(sources.as_slice()[i] as usize),
                next,
            };
            next = link_at(i);
        }
        *node = Node {
            rank: 1.0 / n as f64,
            share: 0.0,
            out_degree: u64::from(out_degree),
            in_edges: next,
        };
    }
    Ok(Shared {
        nodes,
        links,
        offsets,
        sources,
        next,
    })
}

/// The pointer to each element of a slice.
fn ptrs<T>(slice: &[T]) -> impl Fn(usize) -> Ptr<T> + use<T> {
    let base = slice.as_ptr().addr();
    move |i| Ptr::from_addr(base + i * size_of::<T>())
}

/// Iterates until the ranks hold still; says how often, and what the last iteration moved.
fn iterate(
    accel: &Accelerator,
    shared: &mut Shared,
    settings: &PageRank,
) -> Result<(u32, f64), accel_sim::Error> {
    let n = shared.nodes.as_slice().len() as f64;
    let mut dangling = split(accel, shared)?;
    let mut iterations = 0;
    loop {
        let base = (1.0 - settings.damping + settings.damping * dangling) / n;
        let pull = if iterations % 2 == 0 {
            pull_linked
        } else {
            pull_csr
        };
        pull(accel, shared, base, settings.damping)?;
        let sums = advance(accel, shared)?;
        dangling = sums.dangling;
        iterations += 1;
        if sums.moved <= settings.tolerance || iterations >= settings.max_iterations {
            return Ok((iterations, sums.moved));
        }
    }
}

/// Gathers along the linked lists, pointer by pointer.
fn pull_linked(
    accel: &Accelerator,
    shared: &mut Shared,
    base: f64,
    damping: f64,
) -> Result<(), accel_sim::Error> {
    let Shared {
        nodes, links, next, ..
    } = shared;
    let views = (next.view_mut(), nodes.view(), links.view());
    accel.run_items(
        nodes.as_slice().len(),
        views,
        |lane, v, (next, nodes, _links)| {
            let mut gathered = 0.0;
            let mut at = nodes.load(v)?.in_edges;
            while !at.is_null() {
                let link = lane.load(at)?;
                gathered += lane.load(link.from)?.share;
                at = link.next;
            }
            next.store(v, base + damping * gathered)
        },
    )
}

/// Gathers along the CSR, index by index.
fn pull_csr(
    accel: &Accelerator,
    shared: &mut Shared,
    base: f64,
    damping: f64,
) -> Result<(), accel_sim::Error> {
    let Shared {
        nodes,
        offsets,
        sources,
        next,
        ..
    } = shared;
    let nr_nodes = nodes.as_slice().len();
    let views = (
        next.view_mut(),
        nodes.view(),
        offsets.view(),
        sources.view(),
    );
    accel.run_items(
        nr_nodes,
        views,
        |_lane, v, (next, nodes, offsets, sources)| {
            let mut gathered = 0.0;
            for edge in offsets.load(v)?..offsets.load(v + 1)? {
                let from = sources.load(edge as usize)?;
                gathered += nodes.load(from as usize)?.share;
            }
            next.store(v, base + damping * gathered)
        },
    )
}

/// Splits the ranks into shares for the first time; returns what dangles.
fn split(accel: &Accelerator, shared: &mut Shared) -> Result<f64, accel_sim::Error> {
    let dangling = Mutex::new(0.0);
    accel.run(
        (shared.nodes.view_mut(), shared.next.view_mut()),
        |(nodes, next)| {
            let here: f64 = nodes.iter_mut().map(|node| node.split()).sum();
            *dangling.lock().unwrap_or_else(PoisonError::into_inner) += here;
            next.fill(0.0);
        },
    )?;
    Ok(dangling
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner))
}

/// Makes `next` the ranks, and splits them into shares.
fn advance(accel: &Accelerator, shared: &mut Shared) -> Result<Sums, accel_sim::Error> {
    // Plain memory of the CPU's: a kernel may use what it captures. Once per chunk, so a lock will
    // do.
    let sums = Mutex::new(Sums::default());
    accel.run(
        (shared.nodes.view_mut(), shared.next.view()),
        |(nodes, next)| {
            let mut here = Sums::default();
            for (node, &next) in nodes.iter_mut().zip(next) {
                here.moved += (node.rank - next).abs();
                node.rank = next;
                here.dangling += node.split();
            }
            let mut sums = sums.lock().unwrap_or_else(PoisonError::into_inner);
            sums.moved += here.moved;
            sums.dangling += here.dangling;
        },
    )?;
    Ok(sums.into_inner().unwrap_or_else(PoisonError::into_inner))
}

impl Node {
    /// Splits the rank over the out-edges; returns what can't be, the rank of a dangling node.
    fn split(&mut self) -> f64 {
        if self.out_degree == 0 {
            self.share = 0.0;
            return self.rank;
        }
        self.share = self.rank / self.out_degree as f64;
        0.0
    }
}
