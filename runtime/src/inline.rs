//! The inline door: a thread that touches a page which is away resolves its own fault, in its `SIGBUS` handler.
//!
//! What the handler is allowed to do is design rule 1; how it is installed, chained and guarded is [`crate::sys::signal`].

use crate::error::{Access, Error, ErrorKind, Result};
use crate::fault::{self, CpuFault};
use crate::space::AddressSpace;
use crate::stats::count;
use crate::sys::signal::{self, BusFault};

/// Installs the handler, once per process.
pub(crate) fn install(operation: &'static str) -> Result<()> {
    signal::install(on_fault).map_err(|e| {
        Error::new(operation, ErrorKind::System).errno(e.raw_os_error().unwrap_or(libc::ENOMEM))
    })
}

fn on_fault(bus: &BusFault) -> signal::Verdict {
    let Some(space) = AddressSpace::existing().filter(|space| space.is_usable()) else {
        return signal::Verdict::NotOurs;
    };
    let (access, protection) = match bus.access {
        signal::Access::ReadMissing => (Some(Access::Read), Some(false)),
        signal::Access::WriteMissing => (Some(Access::Write), Some(false)),
        signal::Access::WriteProtected => (Some(Access::Write), Some(true)),
        signal::Access::Unknown => (None, None),
    };
    let fault = CpuFault {
        addr: bus.addr,
        access,
        protection,
        thread: signal::thread_pointer(),
    };
    match fault::resolve(space, &fault) {
        fault::Verdict::Resolved => signal::Verdict::Resolved,
        fault::Verdict::NotOurs => signal::Verdict::NotOurs,
        fault::Verdict::Window => overrun(space, bus.addr),
    }
}

/// A worker touched a window page that has gone home: its span outstayed a shootdown's deadline (hazards W2). Its launch
/// is lost; the thread must not go on with memory that is no longer its own, and nothing can make it return from here.
fn overrun(space: &AddressSpace, addr: usize) -> signal::Verdict {
    {
        let gate = space.gate().enter();
        if let Some(place) = space.lookup(&gate, addr) {
            count(&place.region.counters().anomalies, 1);
        }
    }
    signal::Verdict::NotOurs
}
