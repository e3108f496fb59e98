//! What the actors do, and which ways of breaking the code each scenario finds.

use crate::error::Access;
use crate::kernel::Quirks;
use crate::options::{Delivery, Granule};
use crate::sync::mutation::Mutation;
use crate::world::{Setup, Style, World};

/// What some threads do; each schedule of it must hold.
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    pub(crate) run: fn(),
}

/// A way of breaking the code, where it is found, and as what.
pub(crate) struct Mutated {
    pub(crate) mutation: Mutation,
    pub(crate) scenario: &'static str,
    /// One of these is in what the failing schedule says.
    pub(crate) reasons: &'static [&'static str],
}

macro_rules! scenarios {
    ($($name:ident)*) => {
        pub(crate) const SCENARIOS: &[Scenario] =
            &[$(Scenario { name: stringify!($name), run: $name }),*];
    };
}

scenarios! {
    cpu_and_device
}

pub(crate) const MUTATIONS: &[Mutated] = &[];

/// A CPU and a device write and read one page.
fn cpu_and_device() {
    let world = World::new(Setup::default());
    let threads = [
        world.cpu(|w| {
            w.write(0);
            w.write(0);
            w.read(0);
        }),
        world.worker(0, Style::Locked, |d| {
            d.write(0);
            d.read(0);
            d.write(0);
        }),
    ];
    for thread in threads {
        thread.join().expect("it has not panicked");
    }
    world.finish();
}
