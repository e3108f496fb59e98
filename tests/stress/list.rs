//! A linked list, whose pointers a kernel follows.

use std::sync::Mutex;

use bytemuck::{Pod, Zeroable};
use svm::{Buffer, Ptr};

use super::{Checked, KINDS, Run, error};
use crate::rng::{Rng, mix};

#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Node {
    value: u64,
    next: Ptr<Node>,
    _pad: [u64; 6],
}

/// A list in random order that a kernel walks, one node after the other, while the CPU relinks it between walks.
pub(super) fn list(run: &Run) -> Checked {
    let n = 3000;
    let mut rng = Rng::new(mix(run.config.seed ^ mix(40)));
    let mut nodes = Buffer::<Node>::with_options(n, &run.options).map_err(|e| e.to_string())?;
    while run.goes_on() {
        let mut order: Vec<usize> = (0..n).collect();
        for i in (1..n).rev() {
            order.swap(i, rng.below(i + 1));
        }
        let length = 1 + rng.below(n);
        let at = nodes.view().addr();
        let slice = nodes.as_mut_slice();
        for (k, &i) in order.iter().enumerate() {
            let next = order.get(k + 1).filter(|_| k + 1 < length);
            let next = next.map_or(Ptr::null(), |&j| Ptr::from_addr(at + j * size_of::<Node>()));
            slice[i] = Node {
                value: rng.next() >> 24,
                next,
                _pad: [0; 6],
            };
        }
        let wanted: u64 = order[..length].iter().map(|&i| slice[i].value).sum();
        let head: Ptr<Node> = Ptr::from_addr(at + order[0] * size_of::<Node>());
        let found = Mutex::new((0, 0));
        run.accel(&mut rng)
            .run_items(1, nodes.view_mut(), |lane, _, _| {
                let (mut ptr, mut sum, mut steps) = (head, 0u64, 0);
                while !ptr.is_null() {
                    let node = lane.load(ptr)?;
                    lane.store(
                        ptr,
                        Node {
                            value: node.value + 1,
                            ..node
                        },
                    )?;
                    sum += node.value;
                    steps += 1;
                    ptr = node.next;
                }
                *found.lock().expect("no panic while it is held") = (sum, steps);
                Ok(())
            })
            .map_err(error("list"))?;
        let found = found.into_inner().expect("no panic while it is held");
        if found != (wanted, length) {
            return Err(format!(
                "sum and length {found:?}, not {:?}",
                (wanted, length)
            ));
        }
        let after: u64 = order[..length]
            .iter()
            .map(|&i| nodes.as_slice()[i].value)
            .sum();
        if after != wanted + length as u64 {
            return Err(format!(
                "the kernel's stores: sum {after}, not {}",
                wanted + length as u64
            ));
        }
        run.count(KINDS[14], 1);
    }
    run.absorb(nodes.stats());
    Ok(())
}
