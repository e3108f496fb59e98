//! Counters: what moved, why, and by how many system calls.
//!
//! They are kept per region and, for what a device did, per region and device, as relaxed atomics in our own memory, so
//! that counting is legal on the fault path. A [`Stats`] is a sum over them at one moment: exact when nothing runs.

use core::ops::{Add, AddAssign, Sub};
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Why pages moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Cause {
    /// Somebody touched them.
    Demand,
    /// They lay beside a touched page, or a prefetch asked for them.
    Prefetch,
    /// Device memory was full.
    Evict,
    /// An explicit migration, a release or a pin asked for them.
    Explicit,
    /// The mirror or the device went away.
    Drop,
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Live counters; all zero bytes are a valid start.
        #[derive(Debug, Default)]
        pub(crate) struct Counters { $(pub(crate) $name: AtomicU64,)* }

        /// Totals of what the runtime did, at one moment.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct Stats { $($(#[$doc])* pub $name: u64,)* }

        impl Counters {
            /// The totals now.
            pub(crate) fn snapshot(&self) -> Stats {
                Stats { $($name: self.$name.load(Relaxed),)* }
            }

            /// Adds `stats` to the totals.
            pub(crate) fn absorb(&self, stats: &Stats) {
                $(self.$name.fetch_add(stats.$name, Relaxed);)*
            }
        }

        impl AddAssign for Stats {
            fn add_assign(&mut self, other: Self) { $(self.$name += other.$name;)* }
        }

        impl Sub for Stats {
            type Output = Self;
            /// What happened between two snapshots, the older one on the right.
            fn sub(self, older: Self) -> Self { Self { $($name: self.$name - older.$name,)* } }
        }

        impl Stats {
            /// Name and value of every counter, in declaration order.
            pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name),)*].into_iter()
            }
        }
    };
}

counters! {
    /// CPU faults on pages that a device held, by a load (or by an access whose kind the system does not tell).
    cpu_read_faults,
    /// CPU faults on pages that a device held, by a store.
    cpu_write_faults,
    /// CPU stores to a page that devices hold copies of.
    cpu_protect_faults,
    /// CPU touches of pages that nobody had populated.
    cpu_zero_fills,
    /// CPU faults that found nothing to do: somebody else had resolved them.
    cpu_spurious_faults,
    /// Device fault rounds for a load.
    device_read_faults,
    /// Device fault rounds for a store or an atomic.
    device_write_faults,
    /// Device fault rounds that found the page already there.
    device_spurious_faults,
    /// Device fault rounds begun again because an invalidation interrupted them.
    retries,
    /// Faults that had to wait: for an overlapping invalidation, an open span, a lease or a pending event.
    waits,
    /// Pages moved or copied to a device because they were touched.
    to_device_demand_pages,
    /// Pages moved or copied to a device beside a touched page.
    to_device_prefetch_pages,
    /// Pages moved or copied to a device on request.
    to_device_explicit_pages,
    /// Migrations to a device: runs of pages, each one movement.
    to_device_runs,
    /// Pages that came home because the CPU touched them.
    to_host_demand_pages,
    /// Pages that came home beside a touched page.
    to_host_prefetch_pages,
    /// Pages that came home because device memory was full.
    to_host_evict_pages,
    /// Pages that came home on request: explicit migration, release, pin.
    to_host_explicit_pages,
    /// Pages that came home because the mirror or the device went away.
    to_host_drop_pages,
    /// Migrations home: runs of pages, each one movement.
    to_host_runs,
    /// Pages duplicated, so that readers on both sides share them.
    duplicated_pages,
    /// Duplicates given up because somebody wrote.
    collapsed_pages,
    /// Device pages evicted.
    evicted_pages,
    /// Pages a device accessed at the host's address because they could not move.
    in_place_pages,
    /// Invalidations of device translations.
    invalidations,
    /// UFFDIO_MOVE calls.
    move_calls,
    /// UFFDIO_COPY calls.
    copy_calls,
    /// UFFDIO_ZEROPAGE calls.
    zeropage_calls,
    /// UFFDIO_WRITEPROTECT calls.
    write_protect_calls,
    /// Copies of pages by process_vm_readv.
    kernel_copy_calls,
    /// Calls of madvise that dropped pages, where there is no UFFDIO_MOVE.
    discard_calls,
    /// PAGEMAP_SCAN calls.
    scan_calls,
    /// Calls the kernel answered with "changing, try again" because an event was pending.
    changing_outcomes,
    /// Pages taken from under a span that outstayed a shootdown.
    severed_pages,
    /// Times that a device's accesses did not end while an event of the kernel waited to be read: one of them may be the event's own cause.
    outstayed_pauses,
    /// Threads parked because they touched such a page afterwards: the launch ended with an error.
    overruns,
    /// Faults and events that should not exist: our own bugs. Tests assert zero.
    anomalies,
}

impl Add for Stats {
    type Output = Self;
    fn add(mut self, other: Self) -> Self {
        self += other;
        self
    }
}

impl Stats {
    /// Pages moved or copied to a device.
    #[must_use]
    pub fn to_device_pages(&self) -> u64 {
        self.to_device_demand_pages + self.to_device_prefetch_pages + self.to_device_explicit_pages
    }

    /// Pages moved or copied to the host.
    #[must_use]
    pub fn to_host_pages(&self) -> u64 {
        self.to_host_demand_pages
            + self.to_host_prefetch_pages
            + self.to_host_evict_pages
            + self.to_host_explicit_pages
            + self.to_host_drop_pages
    }

    /// System calls of page movement.
    #[must_use]
    pub fn movement_calls(&self) -> u64 {
        self.move_calls
            + self.copy_calls
            + self.zeropage_calls
            + self.write_protect_calls
            + self.kernel_copy_calls
            + self.discard_calls
    }
}

/// Counts `n` more; relaxed, as all counting here.
#[inline]
pub(crate) fn count(counter: &AtomicU64, n: u64) {
    // Nothing is often what there is to count, and a branch is cheaper than a locked instruction.
    if n != 0 {
        counter.fetch_add(n, Relaxed);
    }
}

impl Counters {
    /// Counts a run that went to a device: `demand` pages that were asked for, the others beside them.
    #[inline]
    pub(crate) fn to_device(&self, cause: Cause, demand: u64, beside: u64) {
        count(&self.to_device_runs, 1);
        match cause {
            Cause::Demand => {
                count(&self.to_device_demand_pages, demand);
                count(&self.to_device_prefetch_pages, beside);
            }
            Cause::Prefetch => count(&self.to_device_prefetch_pages, demand + beside),
            Cause::Explicit | Cause::Evict | Cause::Drop => {
                count(&self.to_device_explicit_pages, demand + beside);
            }
        }
    }

    /// Counts a run that came home.
    pub(crate) fn to_host(&self, cause: Cause, demand: u64, beside: u64) {
        count(&self.to_host_runs, 1);
        match cause {
            Cause::Demand => {
                count(&self.to_host_demand_pages, demand);
                count(&self.to_host_prefetch_pages, beside);
            }
            Cause::Prefetch => count(&self.to_host_prefetch_pages, demand + beside),
            Cause::Evict => count(&self.to_host_evict_pages, demand + beside),
            Cause::Explicit => count(&self.to_host_explicit_pages, demand + beside),
            Cause::Drop => count(&self.to_host_drop_pages, demand + beside),
        }
    }
}
