//! Rounds on one block, as the runtime runs them on the hub: who holds a page is changed under the block's lock, inside a
//! bracket; and where a round has to wait for accesses in flight it lets go of the block's lock and keeps the bracket.
//!
//! The invariant: a page never goes away from a device that has a translation to it.

use super::{STALE, page_at};
use crate::notifier::{Hub, Subscription};
use crate::sync::Deadline;
use crate::sync::checker::{Lane, expect_failure, models, reached};
use crate::sync::ideal::Mutex;
use loom::thread;
use std::sync::Arc;

/// Who holds the one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Holder {
    Cpu,
    Device(usize),
}

struct Block {
    hub: Hub,
    holder: Mutex<Holder>,
    /// Per device, under its lock: whether it has a translation to the page.
    translations: [Mutex<bool>; 2],
}

/// What a round does with its bracket while it waits without the block's lock.
#[derive(Clone, Copy, PartialEq, Eq)]
enum WhileWaiting {
    Keep,
    Close,
}

impl Block {
    fn new(holder: Holder) -> Arc<Self> {
        let translation = |device| Mutex::new(holder == Holder::Device(device));
        Arc::new(Self {
            hub: Hub::new(),
            holder: Mutex::new(holder),
            translations: [translation(0), translation(1)],
        })
    }

    /// First pass.
    fn invalidate(&self, holder: Holder) {
        if let Holder::Device(device) = holder {
            *self.translations[device].lock() = false;
        }
    }

    /// The page goes from `from` to `to`.
    fn moves(&self, lane: Lane, holder: &mut Holder, from: Holder, to: Holder) {
        assert_eq!(*holder, from, "moved from where it is not");
        if let Holder::Device(device) = from {
            assert!(
                !*self.translations[device].lock(),
                "stale translation: the page goes from under device {device}"
            );
        }
        *holder = to;
        lane.did(match to {
            Holder::Cpu => "page moves home",
            Holder::Device(_) => "page moves to the device",
        });
    }

    /// A device's fault: `Range::fault_in`.
    fn device_fault(&self, lane: Lane, device: usize, range: &Subscription<&Hub>) {
        loop {
            let token = range.begin(Deadline::NEVER).expect("no teardown");
            lane.did("begin");
            let mut holder = self.holder.lock();
            let from = *holder;
            let mut bracket = None;
            if from != Holder::Device(device) {
                bracket = Some(
                    self.hub
                        .start(page_at(0), Some(range.key()))
                        .expect("a free slot"),
                );
                self.invalidate(from);
                lane.did("start, invalidate; unlock and wait");
                drop(holder);
                holder = self.holder.lock();
                if *holder != from {
                    lane.did("the block has changed: again");
                    continue;
                }
                self.moves(lane, &mut holder, from, Holder::Device(device));
            }
            let mut translation = self.translations[device].lock();
            if range.interrupted(token) {
                lane.did("interrupted: again");
                continue;
            }
            *translation = true;
            lane.did("establish");
            drop(translation);
            drop(bracket);
            return;
        }
    }

    /// A CPU's fault: `fault::resolve`.
    fn cpu_fault(&self, lane: Lane, waiting: WhileWaiting) {
        loop {
            let mut holder = self.holder.lock();
            let from = *holder;
            if from == Holder::Cpu {
                reached("nothing to do for the CPU");
                return;
            }
            let mut bracket = Some(self.hub.start(page_at(0), None).expect("a free slot"));
            self.invalidate(from);
            lane.did("start, invalidate; unlock and wait");
            drop(holder);
            if waiting == WhileWaiting::Close {
                bracket = None;
                lane.did("end, too early");
            }
            holder = self.holder.lock();
            if *holder == from {
                self.moves(lane, &mut holder, from, Holder::Cpu);
                drop(bracket);
                return;
            }
            lane.did("the block has changed: again");
        }
    }

    fn check_at_rest(&self) {
        let holder = *self.holder.lock();
        for (device, translation) in self.translations.iter().enumerate() {
            let is_stale = *translation.lock() && holder != Holder::Device(device);
            assert!(
                !is_stale,
                "stale translation: device {device}, page with {holder:?}"
            );
        }
    }
}

fn faulter(block: &Arc<Block>, lane: usize, device: usize) -> thread::JoinHandle<()> {
    let block = Arc::clone(block);
    thread::spawn(move || {
        let range = block.hub.insert(page_at(0));
        block.device_fault(Lane(lane), device, &range);
    })
}

fn device_and_cpu(waiting: WhileWaiting) {
    let block = Block::new(Holder::Device(0));
    let device = faulter(&block, 0, 0);
    block.cpu_fault(Lane(1), waiting);
    device.join().unwrap();
    block.check_at_rest();
}

/// The device faults on its own page, or on one just taken from it, while the CPU takes it home.
fn device_vs_cpu() {
    device_and_cpu(WhileWaiting::Keep);
}

fn device_vs_cpu_without_bracket() {
    device_and_cpu(WhileWaiting::Close);
}

/// Two devices take the page from the CPU and from each other.
fn device_vs_device() {
    let block = Block::new(Holder::Cpu);
    let devices = [faulter(&block, 0, 0), faulter(&block, 1, 1)];
    devices
        .into_iter()
        .for_each(|device| device.join().unwrap());
    block.check_at_rest();
}

/// Two workers of one device: the owner's filter of one is not the other's.
fn worker_vs_worker() {
    let block = Block::new(Holder::Cpu);
    let workers = [faulter(&block, 0, 0), faulter(&block, 1, 0)];
    workers
        .into_iter()
        .for_each(|worker| worker.join().unwrap());
    block.check_at_rest();
    assert!(*block.translations[0].lock());
}

/// Two devices and the CPU.
fn everybody() {
    let block = Block::new(Holder::Device(0));
    let devices = [faulter(&block, 0, 0), faulter(&block, 1, 1)];
    block.cpu_fault(Lane(2), WhileWaiting::Keep);
    devices
        .into_iter()
        .for_each(|device| device.join().unwrap());
    block.check_at_rest();
}

models! {
    device_vs_cpu reaches ["interrupted: again", "page moves home", "page moves to the device"]
    device_vs_device reaches ["interrupted: again", "the block has changed: again"]
    worker_vs_worker reaches ["interrupted: again", "the block has changed: again"]
    everybody reaches ["interrupted: again", "the block has changed: again"]
}

#[test]
fn a_bracket_closed_while_waiting_lets_the_device_back_in() {
    expect_failure(
        "bracket closed while the round waits",
        STALE,
        device_vs_cpu_without_bracket,
    );
}
