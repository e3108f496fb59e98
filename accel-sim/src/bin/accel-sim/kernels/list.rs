//! Walking a linked list by its pointers: one worker, one load after the other, each page a
//! surprise.

use bytemuck::{Pod, Zeroable};
use svm::{Buffer, Ptr};

use super::{Ran, accelerator, counters, mirroring};
use crate::input::{Node as Index, arrays};
use crate::oracle::Walk;
use crate::report::{Setup, Time, timed};

#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Node {
    payload: u64,
    next: Ptr<Node>,
}

/// What the device writes down: nodes visited, the sum of their payloads, a hash of their order.
const FINDINGS: usize = 3;

/// Walks the cycle that `next` describes, from node 0 until it is back there.
pub(crate) fn run<V>(
    next: &[Index],
    setup: &Setup,
    time: &mut Time,
    verify: impl FnOnce(Walk) -> V,
) -> anyhow::Result<Ran<V>> {
    let accel = accelerator(setup)?;
    let options = mirroring(setup);
    let mut nodes = Buffer::<Node>::with_options(next.len(), &options)?;
    let mut findings = Buffer::<u64>::with_options(FINDINGS, &options)?;
    timed(&mut time.build, || {
        let nodes = nodes.as_mut_slice();
        let base = nodes.as_ptr().addr();
        for (i, (node, &next)) in nodes.iter_mut().zip(next).enumerate() {
            *node = Node {
                payload: arrays::payload(i as Index),
                next: Ptr::from_addr(base + next as usize * size_of::<Node>()),
            };
        }
    });
    timed(&mut time.kernel, || {
        accel.run_items(
            1,
            (findings.view_mut(), nodes.view()),
            |lane, _, (findings, nodes)| {
                let start = nodes.ptr(0);
                let (mut steps, mut sum, mut order) = (0_u64, 0_u64, 0_u64);
                let mut at = start;
                // A list that is not the cycle it should be must not keep the device for ever.
                while steps <= nodes.len() as u64 {
                    let node = lane.load(at)?;
                    steps += 1;
                    sum = sum.wrapping_add(node.payload);
                    order = (order.rotate_left(5) ^ node.payload).wrapping_mul(arrays::ORDER_PRIME);
                    at = node.next;
                    if at == start {
                        break;
                    }
                }
                findings.store(0, steps)?;
                findings.store(1, sum)?;
                findings.store(2, order)
            },
        )
    })?;
    let verdict = timed(&mut time.verify, || {
        let findings = findings.as_slice();
        verify(Walk {
            steps: findings[0],
            sum: findings[1],
            order: findings[2],
        })
    });
    Ok(Ran {
        verdict,
        counters: counters(&accel, &[nodes.stats(), findings.stats()]),
    })
}
