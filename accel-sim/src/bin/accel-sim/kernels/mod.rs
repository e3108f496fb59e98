//! The kernels: what runs on the accelerator.
//!
//! Each lays its input out in shared memory, works on it there, and hands the result to a `verify`
//! closure while that memory is still shared. No byte is copied to or from the device by this code:
//! both sides use the same addresses, and pages go where they are touched.

pub(crate) mod list;
pub(crate) mod pagerank;
pub(crate) mod saxpy;

use accel_sim::Accelerator;

use crate::cli::{Delivery, Granule};
use crate::report::{ByCause, Counters, Migrations, Setup};

/// What a kernel leaves behind.
#[derive(Debug)]
pub(crate) struct Ran<V> {
    /// What `verify` returned.
    pub(crate) verdict: V,
    /// As of the end of `verify`.
    pub(crate) counters: Counters,
}

/// The accelerator asked for.
fn accelerator(setup: &Setup) -> Result<Accelerator, accel_sim::Error> {
    let mut options = accel_sim::Options::new().workers(setup.workers);
    if let Some(bytes) = setup.device_memory {
        // More than the address space has is as much as there is.
        options = options.memory_bytes(usize::try_from(bytes).unwrap_or(usize::MAX));
    }
    Accelerator::with_options(options)
}

/// How memory is to be mirrored.
fn mirroring(setup: &Setup) -> svm::Options {
    let delivery = match setup.delivery {
        Delivery::Inline => svm::Delivery::Inline,
        Delivery::Thread => svm::Delivery::Thread,
    };
    let granule = match setup.granule {
        Granule::K4 => svm::Granule::Page,
        Granule::K64 => svm::Granule::Big,
        Granule::M2 => svm::Granule::Huge,
    };
    svm::Options::new().delivery(delivery).granule(granule)
}

/// What has been counted until now: by the workers, and by the runtime for all of the shared memory.
fn counters(accel: &Accelerator, memory: &[svm::Stats]) -> Counters {
    let workers = accel.stats().total();
    let mut runtime = svm::Stats::default();
    for stats in memory {
        runtime += *stats;
    }
    Counters {
        to_device: Migrations {
            runs: runtime.to_device_runs,
            pages: ByCause {
                demand: runtime.to_device_demand_pages,
                prefetch: runtime.to_device_prefetch_pages,
                explicit: runtime.to_device_explicit_pages,
                ..ByCause::default()
            },
        },
        to_host: Migrations {
            runs: runtime.to_host_runs,
            pages: ByCause {
                demand: runtime.to_host_demand_pages,
                prefetch: runtime.to_host_prefetch_pages,
                explicit: runtime.to_host_explicit_pages,
                evict: runtime.to_host_evict_pages,
                drop: runtime.to_host_drop_pages,
            },
        },
        duplicated_pages: runtime.duplicated_pages,
        collapsed_pages: runtime.collapsed_pages,
        in_place_pages: runtime.in_place_pages,
        far_faults_read: runtime.device_read_faults,
        far_faults_write: runtime.device_write_faults,
        far_faults_coalesced: workers.coalesced,
        retries: runtime.retries,
        cpu_faults_read: runtime.cpu_read_faults,
        cpu_faults_write: runtime.cpu_write_faults + runtime.cpu_protect_faults,
        invalidations: runtime.invalidations,
        translation_hits: workers.tlb_hits,
        translation_misses: workers.tlb_misses,
        anomalies: runtime.anomalies,
    }
}
