//! The inline door: a thread that touches a page which is away resolves its own fault, in its `SIGBUS` handler.
//!
//! A late access to a device's window, through either door, ends here too: see [`crate::overrun`].
//!
//! What the handler is allowed to do is design rule 1; how it is installed, chained and guarded is [`crate::sys::signal`].

use core::cell::Cell;

use crate::error::{Access, Error, ErrorKind, Result};
use crate::fault::{self, CpuFault};
use crate::overrun::{self, Fate};
use crate::space::AddressSpace;
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
        door: None,
        kept_since_ns: Cell::new(0),
    };
    // Of an access that the monitor has read of there is nothing left to resolve.
    let resolved = if bus.late {
        fault::Verdict::Window
    } else {
        fault::resolve(space, &fault)
    };
    match resolved {
        fault::Verdict::Resolved | fault::Verdict::Woken => signal::Verdict::Resolved,
        fault::Verdict::NotOurs => signal::Verdict::NotOurs,
        fault::Verdict::Window => {
            let lifted =
                || overrun::lift_protection(space, &space.gate().enter(), bus.addr, access);
            // Where a mapping is changing, the access meets it again.
            if !bus.late && lifted() != Some(false) {
                return signal::Verdict::Resolved;
            }
            match overrun::touched(space, bus.addr, access, signal::thread_pointer()) {
                Fate::Park => signal::Verdict::Park,
                Fate::NotThere | Fate::Stray => signal::Verdict::NotOurs,
            }
        }
    }
}
