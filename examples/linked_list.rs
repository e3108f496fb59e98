//! A linked list that the CPU builds and the accelerator walks: the links are plain addresses, the same on both sides.
//!
//! `cargo run --release -p examples --example linked_list`

use accel_sim::Accelerator;
use bytemuck::{Pod, Zeroable};
use svm::{Buffer, Ptr};

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Node {
    value: u64,
    next: Ptr<Node>,
}

/// Threads a list through `nodes`, in steps of `stride`, and returns its head.
fn link(nodes: &mut [Node], stride: usize) -> Ptr<Node> {
    let n = nodes.len();
    let mut next = Ptr::null();
    for i in (0..n).rev().map(|i| i * stride % n) {
        let value = i as u64;
        nodes[i] = Node { value, next };
        next = Ptr::to(&nodes[i]);
    }
    next
}

fn main() -> Result<(), accel_sim::Error> {
    let accel = Accelerator::new()?;
    let mut nodes = Buffer::<Node>::zeroed(100_003)?; // a prime: any stride visits every node
    let mut sum = Buffer::<u64>::zeroed(1)?;
    let head = link(nodes.as_mut_slice(), 7919);

    accel.run_items(1, (sum.view_mut(), nodes.view()), |lane, _, (sum, _)| {
        let (mut at, mut total) = (head, 0);
        while !at.is_null() {
            let node = lane.load(at)?; // anywhere in the launch's views; elsewhere it is a typed fault
            total += node.value;
            at = node.next;
        }
        sum.store(0, total)
    })?;

    let n = nodes.len() as u64;
    assert_eq!(sum.as_slice()[0], n * (n - 1) / 2);
    let faults = accel.stats().total().far_faults;
    println!("{n} nodes followed, {faults} far faults, and the sum is right");
    Ok(())
}
