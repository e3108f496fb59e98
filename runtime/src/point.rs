//! Named points at which a test may decide who goes next.
//!
//! A race is replayed by stopping a thread between two steps of a path, letting another run, and letting the first go on. Where it
//! can be stopped is said here, in the paths of faults, commits and invalidations: `point!(RoundMoved, addr)`.
//!
//! Nothing of it is in `svm`: there `point!` is no code at all, its arguments included, and no cargo feature of `svm` changes
//! that, for features are unified over a workspace. The points are compiled into `svm-points` (`runtime/points/`), the same sources
//! once more as a package of its own, on which the replay in `tests/replay/` depends and nothing else does.
//!
//! The hook runs wherever a point is, inside a signal handler among them, and with whatever locks the table says held. So it
//! keeps the law of the fault path: it neither allocates nor logs nor panics, touches no mirrored memory, and waits on futexes
//! of its own memory alone.

#[cfg(not(svm_points))]
macro_rules! point {
    ($name:ident, $addr:expr) => {};
}

#[cfg(svm_points)]
macro_rules! point {
    ($name:ident, $addr:expr) => {
        $crate::point::reached($crate::point::Point::$name, $addr)
    };
}

/// A system call on `$len` bytes, as a test has the kernel answer it: what the kernel may say by its documentation and says
/// rarely. The call itself, in `svm`.
#[cfg(not(svm_points))]
macro_rules! meddled {
    ($call:ident, $len:expr, $whole:expr) => {
        $whole($len)
    };
}

#[cfg(svm_points)]
macro_rules! meddled {
    ($call:ident, $len:expr, $whole:expr) => {
        $crate::point::meddle($crate::point::Call::$call, $len, $whole)
    };
}

/// Whether a test has the kernel be late with the zap that follows a REMOVE event.
#[cfg(not(svm_points))]
macro_rules! meddled_zap {
    () => {
        false
    };
}

#[cfg(svm_points)]
macro_rules! meddled_zap {
    () => {
        $crate::point::is_zap_late()
    };
}

#[cfg(svm_points)]
mod on {
    use std::sync::OnceLock;

    use crate::addr::PAGE_SIZE;
    use crate::sync::mutation::{Mutation, mutate};
    use crate::sys::uffd::{Moved, Stop};

    macro_rules! points {
        ($($(#[$doc:meta])* $name:ident,)*) => {
            /// Where a thread is.
            #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
            #[repr(u32)]
            pub enum Point { $($(#[$doc])* $name,)* }

            impl Point {
                /// All of them; `ALL[p as usize] == p`.
                pub const ALL: &[Self] = &[$(Self::$name,)*];
            }
        };
    }

    points! {
        /// A driver's update has its token. Nothing is held.
        UpdateBegun,
        /// A driver's update has its pages. Nothing is held.
        UpdateFaulted,
        /// A driver's update is about to be checked. Its device lock is held.
        UpdateEnding,
        /// A driver's update was found good. Its device lock is held, nothing is installed yet.
        UpdateEnded,
        /// A round is about to begin. Nothing is held.
        RoundEntering,
        /// A round has locked its block and taken its token. Gate and block are held.
        RoundLocked,
        /// A round has opened its bracket and told the other holders. Gate and block are held.
        RoundExcluding,
        /// A round is about to wait for the other holders' accesses. Only its bracket is open.
        RoundWaiting,
        /// Pages are about to be copied, and nobody can write them any more. Gate and block are held, the bracket is open.
        CopyProtected,
        /// A round has moved its pages. Gate and block are held, and the bracket is open if there is one.
        RoundMoved,
        /// A round is about to check its token. Gate, block and device lock are held.
        RoundCommitting,
        /// A round's translations are installed. Gate, block and device lock are held.
        RoundCommitted,
        /// A CPU fault is about to be looked at. Nothing is held.
        FaultEntering,
        /// A CPU fault knows what to do. Gate and block are held.
        FaultLocked,
        /// A CPU fault has told the holders, and they are done. Gate and block are held, the bracket is open.
        FaultExcluding,
        /// A CPU fault, through the inline door, is about to wait for accesses. Only its bracket is open.
        FaultWaiting,
        /// A CPU fault has changed the page table. Gate and block are held, the bracket is open.
        FaultMoved,
        /// An event was read: its caller may go on. The gate is closed.
        EventRead,
        /// The devices were told of an event and the directory knows. The gate is closed, the block held.
        EventTold,
        /// An eviction has told its device. Gate and block are held, the bracket is open.
        EvictExcluding,
        /// A release is about to begin. Nothing is held.
        ReleaseEntering,
        /// A release has told its device. Gate and block are held, the bracket is open.
        ReleaseExcluding,
        /// A closing mirror has released its hub, and no round is under way. Nothing is held.
        CloseReleased,
        /// A fork keeps rounds out. The fork bracket is held.
        ForkClosed,
        /// A pin has marked its pages. Gate and block are held.
        PinMarked,
    }

    /// What the replay rests on, and can take away.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    #[repr(u32)]
    pub enum Rule {
        /// A commit asks whether its token is still good.
        CommitChecked,
        /// A change of the CPU's page table by a fault is inside a bracket.
        FaultBracketed,
        /// Devices are told before their pages go.
        DevicesTold,
        /// Nothing goes before the accesses to it have ended.
        AccessesAwaited,
        /// A closing mirror's rounds are over before its pages come home.
        CloseExcludesRounds,
    }

    impl Rule {
        /// All of them; `ALL[r as usize] == r`.
        pub const ALL: &[Self] = &[
            Self::CommitChecked,
            Self::FaultBracketed,
            Self::DevicesTold,
            Self::AccessesAwaited,
            Self::CloseExcludesRounds,
        ];
    }

    /// Breaks `rule` for the rest of this process's life: a replay that passes all the same proves nothing.
    pub fn break_rule(rule: Rule) {
        mutate(match rule {
            Rule::CommitChecked => Mutation::CommitWithoutCheck,
            Rule::FaultBracketed => Mutation::FaultWithoutBracket,
            Rule::DevicesTold => Mutation::InvalidateNobody,
            Rule::AccessesAwaited => Mutation::ShootdownNotAwaited,
            Rule::CloseExcludesRounds => Mutation::CloseNotSeen,
        });
    }

    static HOOK: OnceLock<fn(Point, usize)> = OnceLock::new();

    /// Has every point call `hook` from now on, with an address of the block it is about; says whether it is the first. See the
    /// module for what a hook may do.
    pub fn set_hook(hook: fn(Point, usize)) -> bool {
        HOOK.set(hook).is_ok()
    }

    /// A system call that a test may meddle with.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Call {
        /// `UFFDIO_MOVE`.
        Move,
        /// `UFFDIO_COPY`.
        Copy,
        /// The caller of `madvise`, let go on, has not got to its zap yet.
        Zap,
    }

    /// How the kernel answers.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Mood {
        /// As it is.
        Fair,
        /// EAGAIN, and nothing is done: some mapping is changing. Of a zap: it is late.
        Changing,
        /// EAGAIN after the first page.
        Part,
        /// EEXIST or ENOENT of a page that did move, as Linux 6.18 says at times. Of a copy: ENOENT, for a border of mappings that has gone
        /// when one looks for it.
        Stale,
        /// EAGAIN of a page that did move: what it said of that was lost when the call was made again, and a mapping was changing by then.
        Lost,
        /// Of a copy: EEXIST after the first page, for a marker on the empty second one, which goes when it is lifted.
        Marker,
    }

    static MOOD: OnceLock<fn(Call) -> Mood> = OnceLock::new();

    /// Has every such call ask `mood` first; says whether it is the first. The rules of a hook hold.
    pub fn set_mood(mood: fn(Call) -> Mood) -> bool {
        MOOD.set(mood).is_ok()
    }

    pub(crate) fn meddle(call: Call, len: usize, whole: impl Fn(usize) -> Moved) -> Moved {
        let mood = MOOD.get().map_or(Mood::Fair, |mood| mood(call));
        let nothing = |stop| Moved { bytes: 0, stop };
        match (mood, call) {
            (Mood::Changing, _) => nothing(Stop::Changing),
            (Mood::Part, _) if len > PAGE_SIZE => {
                let first = whole(PAGE_SIZE);
                if first.stop == Stop::Complete {
                    Moved {
                        stop: Stop::Changing,
                        ..first
                    }
                } else {
                    first
                }
            }
            (Mood::Stale | Mood::Lost, Call::Move) => {
                let first = whole(PAGE_SIZE);
                if first.stop != Stop::Complete {
                    return first;
                }
                nothing(match mood {
                    Mood::Lost => Stop::Changing,
                    // Either is seen; which one is as good as the other.
                    _ if len > PAGE_SIZE => Stop::NotPresent,
                    _ => Stop::Exists,
                })
            }
            (Mood::Stale, Call::Copy) => nothing(Stop::NotPresent),
            (Mood::Marker, Call::Copy) if len > PAGE_SIZE => Moved {
                stop: Stop::Exists,
                ..whole(PAGE_SIZE)
            },
            _ => whole(len),
        }
    }

    pub(crate) fn is_zap_late() -> bool {
        MOOD.get()
            .is_some_and(|mood| mood(Call::Zap) == Mood::Changing)
    }

    #[inline]
    pub(crate) fn reached(point: Point, addr: usize) {
        // One load: neither a lock nor an allocation.
        if let Some(hook) = HOOK.get() {
            hook(point, addr);
        }
    }
}

#[cfg(svm_points)]
pub use on::{Call, Mood, Point, Rule, break_rule, set_hook, set_mood};
#[cfg(svm_points)]
pub(crate) use on::{is_zap_late, meddle, reached};
