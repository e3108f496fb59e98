//! The tree of ranges: which ones does an interval overlap?
//!
//! An AVL tree ordered by (start, index), each node knowing the greatest end in its subtree (Cormen et al., interval trees; the
//! kernel's `interval_tree.h` is the same on a red-black tree). Nodes are slots of an array and links are indices, so that
//! insertion, removal and search allocate nothing. Recursion is as deep as the tree is high: at most 1.44 log2 n, 32 for a
//! million ranges, some kilobytes of a signal stack.
//!
//! All of it is under the hub's lock.

use super::interval::Interval;
use super::storage::{self, Chunk, Owned};

/// No node.
const NIL: u32 = u32::MAX;

/// One slot: a range, or free.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) interval: Interval,
    /// How often the slot has been used; makes keys of former ranges unlike this one's.
    pub(super) generation: u32,
    /// Threads that sleep in `begin` on this range.
    pub(super) nr_waiting: u32,
    /// The greatest `interval.end` in the subtree under this node.
    max_end: u64,
    left: u32,
    /// Also links the free slots.
    right: u32,
    /// Of the subtree; 1 for a leaf.
    height: u8,
    is_linked: bool,
}

impl Node {
    const FREE: Self = Self {
        interval: Interval::EMPTY,
        generation: 0,
        nr_waiting: 0,
        max_end: 0,
        left: NIL,
        right: NIL,
        height: 1,
        is_linked: false,
    };
}

/// The slots, those in use hung into a tree unless their interval is empty.
#[derive(Debug)]
pub(super) struct Tree {
    nodes: Owned<Node>,
    root: u32,
    free: u32,
    /// Slots ever handed out: those from here on are free without being linked as such.
    nr_used: u32,
}

impl Tree {
    pub(super) const fn new() -> Self {
        Self {
            nodes: Owned::new(),
            root: NIL,
            free: NIL,
            nr_used: 0,
        }
    }

    /// The memory of one more segment; allocates.
    pub(super) fn allocate_segment(segment: usize) -> Result<Chunk<Node>, super::hub::NoMemory> {
        storage::allocate(segment, || Node::FREE)
    }

    pub(super) fn nr_segments(&self) -> usize {
        self.nodes.nr_segments()
    }

    pub(super) fn grow(&mut self, chunk: Chunk<Node>) {
        self.nodes.grow(chunk);
    }

    pub(super) fn at(&self, index: u32) -> &Node {
        self.nodes.at(index)
    }

    pub(super) fn at_mut(&mut self, index: u32) -> &mut Node {
        self.nodes.at_mut(index)
    }

    /// Takes a free slot for `interval`; `None` if there is none and the array must grow.
    pub(super) fn insert(&mut self, interval: Interval) -> Option<u32> {
        let index = if self.free != NIL {
            let index = self.free;
            self.free = self.at(index).right;
            index
        } else if (self.nr_used as usize) < storage::first_of(self.nr_segments()) {
            self.nr_used += 1;
            self.nr_used - 1
        } else {
            return None;
        };
        self.at_mut(index).right = NIL;
        self.link(index, interval);
        Some(index)
    }

    /// Frees a slot.
    pub(super) fn remove(&mut self, index: u32) {
        self.unlink(index);
        let free = self.free;
        let node = self.at_mut(index);
        node.generation = node.generation.wrapping_add(1);
        node.right = free;
        self.free = index;
    }

    /// Gives the range in a slot another interval.
    #[inline]
    pub(super) fn set_interval(&mut self, index: u32, interval: Interval) {
        let is_alone = self.is_alone(index);
        let node = self.nodes.at_mut(index);
        if is_alone && !interval.is_empty() {
            // The only range, as often: the tree stays as it is.
            (node.interval, node.max_end) = (interval, interval.end);
        } else if node.interval != interval {
            self.relink(index, interval);
        }
    }

    /// Whether the range in a slot is the only one that any invalidation can meet.
    #[inline]
    pub(super) fn is_alone(&self, index: u32) -> bool {
        self.root == index && {
            let node = self.at(index);
            (node.left, node.right) == (NIL, NIL)
        }
    }

    fn relink(&mut self, index: u32, interval: Interval) {
        self.unlink(index);
        self.link(index, interval);
    }

    fn link(&mut self, index: u32, interval: Interval) {
        let node = self.at_mut(index);
        node.interval = interval;
        node.is_linked = !interval.is_empty();
        if node.is_linked {
            (node.left, node.right, node.height, node.max_end) = (NIL, NIL, 1, interval.end);
            self.root = self.insert_under(self.root, index);
        }
    }

    fn unlink(&mut self, index: u32) {
        if self.at(index).is_linked {
            self.root = self.remove_under(self.root, index);
            self.at_mut(index).is_linked = false;
        }
    }

    /// Calls `found` with every range that overlaps `interval`, in order of their starts.
    pub(super) fn for_each_overlapping(
        &self,
        interval: Interval,
        found: &mut impl FnMut(u32, &Node),
    ) {
        if !interval.is_empty() && self.root != NIL {
            self.search(self.root, interval, found);
        }
    }

    fn search(&self, at: u32, interval: Interval, found: &mut impl FnMut(u32, &Node)) {
        let node = self.at(at);
        if node.max_end <= interval.start {
            return;
        }
        if node.left != NIL {
            self.search(node.left, interval, found);
        }
        if node.interval.overlaps(interval) {
            found(at, node);
        }
        // Everything to the right starts no earlier than this node.
        if node.right != NIL && node.interval.start < interval.end {
            self.search(node.right, interval, found);
        }
    }

    /// The order of the tree.
    fn comes_before(&self, one: u32, other: u32) -> bool {
        (self.at(one).interval.start, one) < (self.at(other).interval.start, other)
    }

    /// Inserts `index` under `at`; returns the subtree's root.
    fn insert_under(&mut self, at: u32, index: u32) -> u32 {
        if at == NIL {
            return index;
        }
        if self.comes_before(index, at) {
            let left = self.insert_under(self.at(at).left, index);
            self.at_mut(at).left = left;
        } else {
            let right = self.insert_under(self.at(at).right, index);
            self.at_mut(at).right = right;
        }
        self.balance(at)
    }

    /// Takes `index` out from under `at`; returns the subtree's root.
    fn remove_under(&mut self, at: u32, index: u32) -> u32 {
        debug_assert_ne!(at, NIL, "a linked node is found where the order puts it");
        if at == NIL {
            return NIL;
        }
        if at == index {
            let (left, right) = (self.at(at).left, self.at(at).right);
            if right == NIL {
                return left;
            }
            let (next, rest) = self.take_first(right);
            let node = self.at_mut(next);
            (node.left, node.right) = (left, rest);
            return self.balance(next);
        }
        if self.comes_before(index, at) {
            let left = self.remove_under(self.at(at).left, index);
            self.at_mut(at).left = left;
        } else {
            let right = self.remove_under(self.at(at).right, index);
            self.at_mut(at).right = right;
        }
        self.balance(at)
    }

    /// Takes out the first node under `at`; returns it, and the subtree's root.
    fn take_first(&mut self, at: u32) -> (u32, u32) {
        let (left, right) = (self.at(at).left, self.at(at).right);
        if left == NIL {
            return (at, right);
        }
        let (first, rest) = self.take_first(left);
        self.at_mut(at).left = rest;
        (first, self.balance(at))
    }

    fn height(&self, at: u32) -> i32 {
        if at == NIL {
            0
        } else {
            i32::from(self.at(at).height)
        }
    }

    /// How much higher the left side is than the right.
    fn lean(&self, at: u32) -> i32 {
        self.height(self.at(at).left) - self.height(self.at(at).right)
    }

    /// Recomputes what `at` knows of its subtree.
    fn update(&mut self, at: u32) {
        let Node {
            left,
            right,
            interval,
            ..
        } = *self.at(at);
        let height = 1 + self.height(left).max(self.height(right));
        let end_of = |child: u32| {
            if child == NIL {
                0
            } else {
                self.at(child).max_end
            }
        };
        let max_end = interval.end.max(end_of(left)).max(end_of(right));
        let node = self.at_mut(at);
        node.height = u8::try_from(height).unwrap_or(u8::MAX);
        node.max_end = max_end;
    }

    /// Restores the balance at `at`, whose sides differ by two at most; returns the subtree's root.
    fn balance(&mut self, at: u32) -> u32 {
        self.update(at);
        match self.lean(at) {
            2.. => {
                let left = self.at(at).left;
                if self.lean(left) < 0 {
                    let left = self.rotate_left(left);
                    self.at_mut(at).left = left;
                }
                self.rotate_right(at)
            }
            ..=-2 => {
                let right = self.at(at).right;
                if self.lean(right) > 0 {
                    let right = self.rotate_right(right);
                    self.at_mut(at).right = right;
                }
                self.rotate_left(at)
            }
            _ => at,
        }
    }

    fn rotate_right(&mut self, at: u32) -> u32 {
        let up = self.at(at).left;
        self.at_mut(at).left = self.at(up).right;
        self.at_mut(up).right = at;
        self.update(at);
        self.update(up);
        up
    }

    fn rotate_left(&mut self, at: u32) -> u32 {
        let up = self.at(at).right;
        self.at_mut(at).right = self.at(up).left;
        self.at_mut(up).left = at;
        self.update(at);
        self.update(up);
        up
    }
}

#[cfg(all(test, not(svm_loom)))]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    /// xorshift64*: the same sequence in every run.
    struct Random(u64);

    impl Random {
        fn below(&mut self, bound: u64) -> u64 {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % bound
        }

        /// One in eight is empty, one in eight is long.
        fn interval(&mut self) -> Interval {
            let start = self.below(1000);
            let len = match self.below(8) {
                0 => 0,
                1 => self.below(1000),
                _ => 1 + self.below(20),
            };
            Interval::new(start, start + len)
        }
    }

    fn insert(tree: &mut Tree, interval: Interval) -> u32 {
        loop {
            if let Some(index) = tree.insert(interval) {
                return index;
            }
            tree.grow(Tree::allocate_segment(tree.nr_segments()).unwrap());
        }
    }

    /// Checks order, balance and `max_end` under `at`; returns the nodes in order and the height.
    fn check(tree: &Tree, at: u32, in_order: &mut Vec<u32>) -> (i32, u64) {
        if at == NIL {
            return (0, 0);
        }
        let node = tree.at(at);
        assert!(node.is_linked && !node.interval.is_empty());
        let (left, left_end) = check(tree, node.left, in_order);
        in_order.push(at);
        let (right, right_end) = check(tree, node.right, in_order);
        assert!((left - right).abs() <= 1, "unbalanced at {at}");
        assert_eq!(i32::from(node.height), 1 + left.max(right));
        assert_eq!(node.max_end, node.interval.end.max(left_end).max(right_end));
        (i32::from(node.height), node.max_end)
    }

    #[test]
    fn finds_what_a_list_finds() {
        let mut random = Random(0x5EED);
        let mut tree = Tree::new();
        let mut list = BTreeMap::new();
        for step in 0..20_000 {
            match random.below(10) {
                0..=3 if list.len() < 300 => {
                    let interval = random.interval();
                    let index = insert(&mut tree, interval);
                    assert!(
                        list.insert(index, interval).is_none(),
                        "slot {index} handed out twice"
                    );
                }
                4..=5 if !list.is_empty() => {
                    let nth = random.below(list.len() as u64) as usize;
                    let index = *list.keys().nth(nth).expect("below len");
                    let generation = tree.at(index).generation;
                    tree.remove(index);
                    assert_ne!(tree.at(index).generation, generation);
                    list.remove(&index);
                }
                6 if !list.is_empty() => {
                    let nth = random.below(list.len() as u64) as usize;
                    let index = *list.keys().nth(nth).expect("below len");
                    let interval = random.interval();
                    tree.set_interval(index, interval);
                    list.insert(index, interval);
                }
                _ => {
                    let interval = random.interval();
                    let mut found = Vec::new();
                    tree.for_each_overlapping(interval, &mut |index, node| {
                        assert_eq!(node.interval, list[&index]);
                        found.push(index);
                    });
                    let mut expected: Vec<_> = list
                        .iter()
                        .filter(|(_, of)| of.overlaps(interval))
                        .map(|(&index, of)| (of.start, index))
                        .collect();
                    expected.sort_unstable();
                    assert!(
                        expected.iter().map(|&(_, index)| index).eq(found),
                        "step {step}: {interval:?}"
                    );
                }
            }
            if step % 64 == 0 {
                let mut in_order = Vec::new();
                check(&tree, tree.root, &mut in_order);
                assert!(in_order.is_sorted_by_key(|&index| (tree.at(index).interval.start, index)));
                assert_eq!(
                    in_order.len(),
                    list.values().filter(|of| !of.is_empty()).count()
                );
            }
        }
    }

    #[test]
    fn stays_flat_and_its_edges_are_exact() {
        const N: u64 = 4096;
        let mut tree = Tree::new();
        for at in 0..N {
            insert(&mut tree, Interval::new(10 * at, 10 * at + 5));
        }
        assert!(i32::from(tree.at(tree.root).height) <= 18, "1.44 log2 n");
        let nr_found = |start, end| {
            let mut nr = 0;
            tree.for_each_overlapping(Interval::new(start, end), &mut |_, _| nr += 1);
            nr
        };
        for at in 0..N {
            assert_eq!(nr_found(10 * at + 5, 10 * at + 10), 0, "between two ranges");
            assert_eq!(
                nr_found(10 * at + 4, 10 * at + 11),
                if at + 1 < N { 2 } else { 1 }
            );
        }
    }
}
