//! Element kernels: items by number, each with handles and a lane.
//!
//! Items are worked on in batches, so that what a batch costs (a fence, a look at the queue) is shared by many.

use std::marker::PhantomData;
use std::ops::Range;

use svm::DeviceFault;

use crate::lane::Lane;
use crate::launch::{Failure, Launch, Operands, Work, catch};
use crate::shootdown::Slot;
use crate::view::ViewSet;
use crate::worker::Worker;

/// The work of a launch by items.
pub(crate) struct ItemWork<V, K> {
    operands: Operands,
    nr_items: usize,
    batch: usize,
    kernel: K,
    _views: PhantomData<fn(V)>,
}

impl<V, K> ItemWork<V, K>
where
    V: ViewSet,
    K: for<'l, 's> Fn(
            &'l Lane<'s>,
            usize,
            &'l <V as ViewSet>::Elements<'s>,
        ) -> Result<(), DeviceFault>
        + Sync
        + Send,
{
    pub(crate) fn new(operands: Operands, nr_items: usize, kernel: K, nr_workers: usize) -> Self {
        let batch = (nr_items / (8 * nr_workers)).clamp(1, 1024);
        ItemWork {
            operands,
            nr_items,
            batch,
            kernel,
            _views: PhantomData,
        }
    }

    fn items(&self, batch: usize) -> Range<usize> {
        batch * self.batch..((batch + 1) * self.batch).min(self.nr_items)
    }
}

/// Leaves element mode when it goes.
struct ElementMode<'a>(&'a Slot);

impl Drop for ElementMode<'_> {
    fn drop(&mut self) {
        self.0.leave_element_mode();
    }
}

impl<V, K> Work for ItemWork<V, K>
where
    V: ViewSet,
    K: for<'l, 's> Fn(
            &'l Lane<'s>,
            usize,
            &'l <V as ViewSet>::Elements<'s>,
        ) -> Result<(), DeviceFault>
        + Sync
        + Send,
{
    fn nr_items(&self) -> usize {
        self.nr_items.div_ceil(self.batch)
    }

    fn item(&self, worker: &Worker, launch: &Launch, batch: usize) -> Result<(), Failure> {
        worker.cache().use_for(launch.id());
        let lane = Lane::new(worker, launch, &self.operands.views, &self.operands.spaces);
        // SAFETY: the operands, which the lane is of, were made of a `V`.
        let elements = unsafe { <V as ViewSet>::elements(&lane) };
        worker.slot().enter_element_mode();
        let mode = ElementMode(worker.slot());
        let ran = catch(|| {
            for i in self.items(batch) {
                if launch.is_stopping() {
                    break;
                }
                (self.kernel)(&lane, i, &elements)?;
            }
            Ok(())
        });
        drop(mode);
        lane.flush_counts();
        ran?.map_err(Failure::Fault)
    }

    fn finish(self: Box<Self>) -> Result<(), svm::Error> {
        self.operands.finish()
    }
}
