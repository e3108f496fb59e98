//! The regression guard for what a fault asks of the kernel: the system calls of each kind, by name and in order, of every thread.
//!
//! `counts` asserts what the runtime says it did. Here the kernel says it: each test runs once more, in a process of its own, under a
//! tracer (ptrace, which a process may always do to its children), and every call between two marks is on the list. So a futex, a
//! yield, a barrier or a look at the clock that somebody adds to a fault shows. The clock usually is no system call, since the
//! kernel lends its code to the process (the vDSO); the tracer hides that from the C library, so that it is one.

#![cfg(target_os = "linux")]
#![allow(
    clippy::multiple_unsafe_ops_per_block,
    reason = "a pointer and its use, under one proof"
)]

use std::time::Duration;

use accel_sim::Accelerator;
use svm::{Access, AttachOptions, Attachment, Buffer, Delivery, Granule, MappedRef, Options};
use tests::idle::{Idle, TIMEOUT, fault_in};
use tests::{Watchdog, usable};
use tracer::{Calls, rest, step, traced};

const PAGE: usize = 4096;
const BLOCK: usize = 512 * PAGE;

/// A buffer, and a device that faults on it when told to: with what a driver keeps, so that nothing is made on the way.
struct Rig {
    range: svm::Range<Idle>,
    mapped: MappedRef<Idle>,
    attachment: Attachment<Idle>,
    buffer: Buffer<u8>,
    _signals: svm::WorkerThread,
}

impl Rig {
    fn new(len: usize, options: &Options) -> Self {
        Self::with_memory(len, options, AttachOptions::new())
    }

    fn with_memory(len: usize, options: &Options, attach: AttachOptions) -> Self {
        let mut buffer = Buffer::with_options(len, options).unwrap();
        buffer.as_mut_slice().fill(1);
        let attachment = svm::attach(Idle::default(), attach).unwrap();
        let mapped = attachment.map(buffer.view().region()).unwrap();
        Self {
            range: attachment.range().unwrap(),
            mapped,
            attachment,
            buffer,
            _signals: svm::worker_thread(),
        }
    }

    /// The region's page at `byte` of the buffer.
    fn page(&self, byte: usize) -> usize {
        let view = self.buffer.view();
        (view.addr() + byte - view.region().base()) / PAGE
    }

    /// One device fault.
    fn fault(&mut self, byte: usize, access: Access) {
        let page = self.page(byte);
        fault_in(&mut self.range, &self.mapped, page..page + 1, access).unwrap();
    }

    /// One update over everything: a prefetch.
    fn prefetch(&mut self) {
        let pages = self.page(0)..self.page(0) + self.buffer.len() / PAGE;
        let mut update = self
            .range
            .start_update(&self.mapped, pages, TIMEOUT)
            .unwrap();
        update.fault(Access::Write).unwrap();
        let guard = self.attachment.device().device_lock().lock();
        assert!(update.end_update(&guard).is_ok(), "nobody interrupts it");
    }

    /// The CPU writes a byte.
    fn write(&mut self, byte: usize) {
        // SAFETY: in the buffer; volatile, as the fault is what it is for.
        unsafe { (&raw mut self.buffer.as_mut_slice()[byte]).write_volatile(7) };
    }

    /// The CPU reads a byte.
    fn read(&self, byte: usize) -> u8 {
        // SAFETY: as in `write`.
        unsafe { (&raw const self.buffer.as_slice()[byte]).read_volatile() }
    }
}

type ByThread = &'static [(&'static str, Calls)];

const NOTHING: ByThread = &[];
const ONE_MOVE: ByThread = &[("caller", &["MOVE"])];
/// The look at the clock is for the lease of a thread that fetches a page again and again.
const MOVE_HOME: ByThread = &[(
    "caller",
    &["SIGBUS", "MOVE", "clock_gettime", "rt_sigreturn"],
)];
const COLLAPSE: ByThread = &[(
    "caller",
    &["SIGBUS", "WRITEPROTECT", "clock_gettime", "rt_sigreturn"],
)];

#[test]
fn a_device_fault_that_migrates_is_one_move() {
    traced(
        "a_device_fault_that_migrates_is_one_move",
        || {
            for granule in [Granule::Page, Granule::Big] {
                let mut rig = Rig::new(1 << 20, &Options::new().granule(granule));
                rig.fault(0, Access::Write);
                step(|| rig.fault(granule.bytes(), Access::Write));
                step(|| rig.fault(2 * granule.bytes(), Access::Read));
            }
        },
        &[ONE_MOVE; 4],
    );
}

/// The first copy of a page is a look at what its mapping permits (which `mprotect` tells nobody of), a move out, and a copy back.
/// From then on the window has a page to copy over, and the copy itself shows whether it is permitted.
#[test]
fn a_device_fault_that_duplicates_is_two_calls() {
    const FIRST: ByThread = &[("caller", &["PROCMAP_QUERY", "MOVE", "COPY"])];
    const AGAIN: ByThread = &[("caller", &["WRITEPROTECT", "process_vm_readv"])];
    traced(
        "a_device_fault_that_duplicates_is_two_calls",
        || {
            for granule in [Granule::Page, Granule::Big] {
                let options = Options::new().granule(granule).read_mostly(true);
                let mut rig = Rig::new(1 << 20, &options);
                rig.fault(0, Access::Read);
                step(|| rig.fault(granule.bytes(), Access::Read));
                rig.write(granule.bytes());
                step(|| rig.fault(granule.bytes(), Access::Read));
            }
        },
        &[FIRST, AGAIN, FIRST, AGAIN],
    );
}

#[test]
fn a_cpu_touch_of_a_device_page_inline_is_one_move() {
    traced(
        "a_cpu_touch_of_a_device_page_inline_is_one_move",
        || {
            for granule in [Granule::Page, Granule::Big] {
                let mut rig = Rig::new(1 << 20, &Options::new().granule(granule));
                let at = |n| n * granule.bytes();
                (0..4).for_each(|n| rig.fault(at(n), Access::Write));
                rig.write(0);
                step(|| rig.write(at(1)));
                step(|| assert_eq!(rig.read(at(2)), 1));
                // What is home is memory like any other.
                step(|| rig.write(at(1)));
            }
        },
        &[MOVE_HOME, MOVE_HOME, NOTHING, MOVE_HOME, MOVE_HOME, NOTHING],
    );
}

#[test]
fn a_cpu_write_to_a_shared_page_inline_is_one_call() {
    traced(
        "a_cpu_write_to_a_shared_page_inline_is_one_call",
        || {
            for granule in [Granule::Page, Granule::Big] {
                let options = Options::new().granule(granule).read_mostly(true);
                let mut rig = Rig::new(1 << 20, &options);
                let at = |n| n * granule.bytes();
                (0..2).for_each(|n| rig.fault(at(n), Access::Read));
                rig.write(0);
                // Shared, it is read as if nobody else had it.
                step(|| assert_eq!(rig.read(at(1)), 1));
                step(|| rig.write(at(1)));
            }
        },
        &[NOTHING, COLLAPSE, NOTHING, COLLAPSE],
    );
}

#[test]
fn through_the_thread_door_the_monitor_makes_the_calls() {
    traced(
        "through_the_thread_door_the_monitor_makes_the_calls",
        || {
            let options = Options::new()
                .delivery(Delivery::Thread)
                .granule(Granule::Page);
            let mut moved = Rig::new(1 << 20, &options);
            (0..3).for_each(|n| moved.fault(n * PAGE, Access::Write));
            (0..2).for_each(|n| moved.write(n * PAGE));
            step(|| moved.write(2 * PAGE));
            let mut shared = Rig::new(1 << 20, &options.clone().read_mostly(true));
            (0..2).for_each(|n| shared.fault(n * PAGE, Access::Read));
            shared.write(0);
            step(|| shared.write(PAGE));
        },
        &[
            &[("svm-monitor", &["read", "MOVE", "poll"])],
            &[("svm-monitor", &["read", "WRITEPROTECT", "poll"])],
        ],
    );
}

/// But for what the mapping permits: nothing has to move that would show it.
#[test]
fn a_write_after_a_read_that_moved_the_page_moves_nothing() {
    traced(
        "a_write_after_a_read_that_moved_the_page_moves_nothing",
        || {
            let mut rig = Rig::new(1 << 20, &Options::new());
            rig.fault(0, Access::Read);
            step(|| rig.fault(0, Access::Write));
        },
        &[&[("caller", &["PROCMAP_QUERY"])]],
    );
}

/// The one look at the clock is the caller's timeout.
#[test]
fn a_prefetch_is_one_call_a_block_and_one_in_all_for_huge_pages() {
    traced(
        "a_prefetch_is_one_call_a_block_and_one_in_all_for_huge_pages",
        || {
            for huge in [false, true] {
                let options = Options::new().granule(Granule::Huge).huge_pages(huge);
                let mut rig = Rig::new(4 * BLOCK, &options);
                rig.prefetch();
                rig.attachment.release().unwrap();
                rig.buffer.as_mut_slice().fill(2);
                step(|| rig.prefetch());
            }
        },
        &[
            &[("caller", &["clock_gettime", "MOVE", "MOVE", "MOVE", "MOVE"])],
            &[("caller", &["clock_gettime", "MOVE"])],
        ],
    );
}

/// The look at the clock is for the victim's lease.
#[test]
fn an_eviction_is_one_move_home_before_the_one_out() {
    traced(
        "an_eviction_is_one_move_home_before_the_one_out",
        || {
            let options = Options::new().granule(Granule::Huge);
            let attach = AttachOptions::new().memory_bytes(2 * BLOCK);
            let mut rig = Rig::with_memory(8 * BLOCK, &options, attach);
            (0..4).for_each(|n| rig.fault(n * BLOCK, Access::Write));
            step(|| rig.fault(4 * BLOCK, Access::Write));
        },
        &[&[("caller", &["MOVE", "clock_gettime", "MOVE"])]],
    );
}

/// Two wake-ups, of the worker and of the caller. What else there is: whether the process is still the one that made the
/// accelerator, signals masked while the runtime's locks are held (the region is found, its protection looked at, its use begun and
/// ended), and a worker that yields before it sleeps.
#[test]
fn a_launch_on_what_is_in_place_only_wakes_the_worker_and_the_caller() {
    traced(
        "a_launch_on_what_is_in_place_only_wakes_the_worker_and_the_caller",
        || {
            let accel = Accelerator::with_options(accel_sim::Options::new().workers(1)).unwrap();
            let mut data = Buffer::<u64>::zeroed(1 << 16).unwrap();
            let mut run = || {
                accel
                    .run(data.view_mut(), |data| {
                        // Until the caller sleeps: else it is chance whether it has to.
                        rest();
                        data.iter_mut().for_each(|x| *x += 1);
                    })
                    .unwrap();
            };
            run();
            step(run);
            assert_eq!(data.as_slice()[0], 2);
        },
        &[&[
            (
                "accel-0",
                &[
                    "rt_sigprocmask",
                    "rt_sigprocmask",
                    "futex wake",
                    "sched_yield",
                    "sched_yield",
                    "sched_yield",
                    "sched_yield",
                    "futex wait",
                ],
            ),
            (
                "caller",
                &[
                    "getpid",
                    "rt_sigprocmask",
                    "rt_sigprocmask",
                    "rt_sigprocmask",
                    "rt_sigprocmask",
                    "PROCMAP_QUERY",
                    "rt_sigprocmask",
                    "rt_sigprocmask",
                    "futex wake",
                    "getpid",
                    "futex wait",
                ],
            ),
        ]],
    );
}

/// Traces a process, and is the other side in it.
mod tracer {
    use std::collections::HashMap;
    use std::os::unix::process::CommandExt;
    use std::process::{Command, Stdio};
    use std::{env, fs, io, thread};

    use super::*;

    /// System calls by name; ioctls by the name of the request; signals by theirs.
    pub(super) type Calls = &'static [&'static str];

    /// The threads that asked for something, by name, and what.
    type Step = Vec<(String, Vec<String>)>;

    const BEGIN: libc::c_long = 0x5356_0001;
    const END: libc::c_long = 0x5356_0002;
    const REST: libc::c_long = 0x5356_0003;

    fn mark(what: libc::c_long) {
        // SAFETY: no such operation exists: an error, which nobody but a tracer sees.
        unsafe { libc::syscall(libc::SYS_prctl, what, 0, 0, 0, 0) };
    }

    /// In the traced process: what `job` asks of the kernel is on the list.
    pub(super) fn step(job: impl FnOnce()) {
        mark(BEGIN);
        job();
        mark(END);
    }

    /// In the traced process: goes on when all other threads sleep.
    pub(super) fn rest() {
        mark(REST);
    }

    /// Runs `body` under a tracer; its steps must have asked of the kernel what `expected` says, by thread. `test` is the test's name.
    pub(super) fn traced(test: &'static str, body: impl FnOnce(), expected: &[ByThread]) {
        const MARK: &str = "SVM_TEST_TRACED";
        if env::var_os(MARK).is_some_and(|mark| mark == test) {
            return body();
        }
        let _watchdog = Watchdog::with_timeout(test, Duration::from_secs(45));
        if !usable() {
            return;
        }
        let mut command = Command::new(env::current_exe().unwrap());
        command
            .args(["--exact", test, "--nocapture", "--test-threads=1"])
            .env(MARK, test)
            .stdout(Stdio::piped());
        // SAFETY: one system call, between fork and exec.
        unsafe {
            command.pre_exec(|| match libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            });
        }
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(error) if matches!(error.raw_os_error(), Some(libc::EPERM | libc::ENOSYS)) => {
                tests::skip(format!("no process may be traced here: {error}"));
                return;
            }
            Err(error) => panic!("{error}"),
        };
        let steps = Tracer::new(child.id().cast_signed()).run();
        let mut said = String::new();
        io::Read::read_to_string(&mut child.stdout.take().unwrap(), &mut said).unwrap();
        let steps = match steps {
            Ok(steps) => steps,
            Err(Refused) => {
                tests::skip("the kernel does not say what system call a process is in");
                return;
            }
        };
        assert!(said.contains("1 passed"), "{test}, traced:\n{said}");
        let expected: Vec<Step> = expected
            .iter()
            .map(|step| {
                let owned = |(who, calls): &(&str, Calls)| {
                    (
                        who.to_string(),
                        calls.iter().map(ToString::to_string).collect(),
                    )
                };
                step.iter().map(owned).collect()
            })
            .collect();
        // The monitor asks what time it is once for a lease, and once in so many faults to see how quickly they come; after a pause, anew.
        let is_counted = |who: &str, call: &str| who != "svm-monitor" || call != "clock_gettime";
        let mut steps = steps;
        for (who, calls) in steps.iter_mut().flatten() {
            calls.retain(|call| is_counted(who, call));
        }
        assert!(
            steps == expected,
            "{test}: what its steps asked of the kernel\n{steps:#?}\nand not\n{expected:#?}"
        );
    }

    /// `PTRACE_GET_SYSCALL_INFO` is not to be had.
    struct Refused;

    /// What a thread of the traced process is at.
    #[derive(Clone, Copy, PartialEq, Eq)]
    enum At {
        User,
        /// In a call, in which it may sleep.
        Sleep,
        /// In another call.
        Call,
    }

    struct Tracer {
        pid: libc::pid_t,
        threads: HashMap<libc::pid_t, At>,
        /// The thread that is at a mark until all others sleep.
        held: Option<(libc::pid_t, libc::c_long)>,
        /// The thread that makes the present step, and what each has asked for.
        step: Option<(libc::pid_t, HashMap<libc::pid_t, Vec<String>>)>,
        steps: Vec<Step>,
    }

    impl Tracer {
        fn new(pid: libc::pid_t) -> Self {
            Self {
                pid,
                threads: HashMap::new(),
                held: None,
                step: None,
                steps: Vec::new(),
            }
        }

        /// Until the process ends.
        fn run(mut self) -> Result<Vec<Step>, Refused> {
            let mut begun = false;
            loop {
                let mut status = 0;
                // Not those of other threads of ours, whose tests trace processes of their own.
                let flags = libc::__WALL | libc::__WNOTHREAD | libc::WNOHANG;
                // SAFETY: writes the status.
                let tid = unsafe { libc::waitpid(-1, &raw mut status, flags) };
                assert!(tid >= 0, "{}", io::Error::last_os_error());
                if tid == 0 {
                    if !self.release() {
                        thread::sleep(Duration::from_micros(100));
                    }
                } else if libc::WIFSTOPPED(status) {
                    if !begun {
                        begun = true;
                        self.begin(tid)?;
                    } else {
                        self.stopped(tid, status)?;
                    }
                } else {
                    self.threads.remove(&tid);
                    if tid == self.pid {
                        return Ok(self.steps);
                    }
                }
            }
        }

        /// The process has just been loaded.
        fn begin(&mut self, tid: libc::pid_t) -> Result<(), Refused> {
            const SYSGOOD: usize = 1;
            const CLONE: usize = 8;
            const EXITKILL: usize = 1 << 20;
            let options = SYSGOOD | CLONE | EXITKILL;
            assert_eq!(
                ptrace(libc::PTRACE_SETOPTIONS, tid, 0, options),
                0,
                "options"
            );
            hide_vdso(tid, info_of(tid)?.stack_pointer as usize);
            self.threads.insert(tid, At::User);
            resume(tid, 0);
            Ok(())
        }

        fn stopped(&mut self, tid: libc::pid_t, status: i32) -> Result<(), Refused> {
            let signal = libc::WSTOPSIG(status);
            self.threads.entry(tid).or_insert(At::User);
            if signal == libc::SIGTRAP | 0x80 {
                let info = info_of(tid)?;
                if info.op != ENTRY {
                    self.threads.insert(tid, At::User);
                } else {
                    // SAFETY: on entry this is the part that the kernel has filled in.
                    let entry = unsafe { info.u.entry };
                    let (nr, args) = (entry.nr as libc::c_long, entry.args);
                    let at = if may_sleep(nr, args) {
                        At::Sleep
                    } else {
                        At::Call
                    };
                    self.threads.insert(tid, at);
                    if nr == libc::SYS_prctl && (BEGIN..=REST).contains(&(args[0] as libc::c_long))
                    {
                        assert!(self.held.is_none(), "two threads at marks");
                        self.held = Some((tid, args[0] as libc::c_long));
                        return Ok(());
                    }
                    self.note(tid, name_of(nr, args));
                }
                resume(tid, 0);
            } else if status >> 16 != 0 || signal == libc::SIGSTOP {
                // A thread has been made, or is the one that was.
                resume(tid, 0);
            } else {
                self.note(
                    tid,
                    match signal {
                        libc::SIGBUS => "SIGBUS".to_owned(),
                        other => format!("signal {other}"),
                    },
                );
                resume(tid, signal);
            }
            Ok(())
        }

        fn note(&mut self, tid: libc::pid_t, call: String) {
            if let Some((_, of)) = &mut self.step {
                of.entry(tid).or_default().push(call);
            }
        }

        /// Lets the thread at a mark go on, if all others sleep.
        fn release(&mut self) -> bool {
            let Some((held, mark)) = self.held else {
                return false;
            };
            let sleeps = |(&tid, &at): (&libc::pid_t, &At)| {
                tid == held || (at == At::Sleep && self.state_of(tid) == Some('S'))
            };
            if !self.threads.iter().all(sleeps) {
                return false;
            }
            self.held = None;
            match mark {
                BEGIN => self.step = Some((held, HashMap::new())),
                END => {
                    let (caller, of) = self.step.take().expect("a step has begun");
                    let mut step: Vec<_> = of
                        .into_iter()
                        .map(|(tid, calls)| {
                            let is_caller = tid == caller;
                            let who = if is_caller {
                                "caller".to_owned()
                            } else {
                                self.comm_of(tid)
                            };
                            (who, calls)
                        })
                        .collect();
                    step.sort();
                    self.steps.push(step);
                }
                _ => {}
            }
            resume(held, 0);
            true
        }

        fn comm_of(&self, tid: libc::pid_t) -> String {
            let comm = fs::read_to_string(format!("/proc/{}/task/{tid}/comm", self.pid));
            comm.unwrap_or_default().trim().to_owned()
        }

        /// `S` if it sleeps.
        fn state_of(&self, tid: libc::pid_t) -> Option<char> {
            let stat = fs::read_to_string(format!("/proc/{}/task/{tid}/stat", self.pid)).ok()?;
            // Behind the name, which may contain anything.
            stat.rsplit_once(") ")?.1.chars().next()
        }
    }

    const ENTRY: u8 = 1;

    fn ptrace(request: libc::c_uint, tid: libc::pid_t, addr: usize, data: usize) -> libc::c_long {
        // SAFETY: acts on the traced process; what is written here is written to places that the callers pass.
        unsafe { libc::ptrace(request, tid, addr, data) }
    }

    /// Until its next call, or the end of this one. It may have been killed.
    fn resume(tid: libc::pid_t, signal: i32) {
        ptrace(libc::PTRACE_SYSCALL, tid, 0, signal as usize);
    }

    fn info_of(tid: libc::pid_t) -> Result<libc::ptrace_syscall_info, Refused> {
        // SAFETY: integers: zero is a value.
        let mut info: libc::ptrace_syscall_info = unsafe { std::mem::zeroed() };
        let size = size_of_val(&info);
        let place = (&raw mut info).expose_provenance();
        match ptrace(libc::PTRACE_GET_SYSCALL_INFO, tid, size, place) {
            1.. => Ok(info),
            _ => Err(Refused),
        }
    }

    /// Takes the kernel's own code out of what the program is told at its start (the auxiliary vector, above the environment).
    fn hide_vdso(tid: libc::pid_t, stack: usize) {
        const WORD: usize = size_of::<usize>();
        const AT_NULL: usize = 0;
        const AT_IGNORE: usize = 1;
        const AT_SYSINFO_EHDR: usize = 33;
        // glibc's wrapper gives the word.
        let peek = |at: usize| ptrace(libc::PTRACE_PEEKDATA, tid, at, 0) as usize;
        let nr_args = peek(stack);
        let mut at = stack + (1 + nr_args + 1) * WORD;
        while peek(at) != 0 {
            at += WORD;
        }
        at += WORD;
        while peek(at) != AT_NULL {
            if peek(at) == AT_SYSINFO_EHDR {
                assert_eq!(ptrace(libc::PTRACE_POKEDATA, tid, at, AT_IGNORE), 0);
            }
            at += 2 * WORD;
        }
    }

    fn may_sleep(nr: libc::c_long, args: [u64; 6]) -> bool {
        const FUTEX_CMD_MASK: u64 = 0x7f;
        const FUTEX_WAIT: u64 = 0;
        const FUTEX_WAIT_BITSET: u64 = 9;
        match nr {
            libc::SYS_futex => {
                matches!(args[1] & FUTEX_CMD_MASK, FUTEX_WAIT | FUTEX_WAIT_BITSET)
            }
            #[cfg(target_arch = "x86_64")]
            libc::SYS_poll => true,
            libc::SYS_ppoll | libc::SYS_clock_nanosleep | libc::SYS_read => true,
            _ => false,
        }
    }

    fn name_of(nr: libc::c_long, args: [u64; 6]) -> String {
        let name = match nr {
            libc::SYS_ioctl => return request_of(args[1] as u32),
            libc::SYS_futex if may_sleep(nr, args) => "futex wait",
            libc::SYS_futex => "futex wake",
            #[cfg(target_arch = "x86_64")]
            libc::SYS_poll => "poll",
            libc::SYS_ppoll => "poll",
            libc::SYS_read => "read",
            libc::SYS_write => "write",
            libc::SYS_process_vm_readv => "process_vm_readv",
            libc::SYS_clock_gettime => "clock_gettime",
            libc::SYS_clock_nanosleep => "clock_nanosleep",
            libc::SYS_sched_yield => "sched_yield",
            libc::SYS_membarrier => "membarrier",
            libc::SYS_madvise => "madvise",
            libc::SYS_mmap => "mmap",
            libc::SYS_munmap => "munmap",
            libc::SYS_mprotect => "mprotect",
            libc::SYS_brk => "brk",
            libc::SYS_getpid => "getpid",
            libc::SYS_gettid => "gettid",
            libc::SYS_rt_sigprocmask => "rt_sigprocmask",
            libc::SYS_rt_sigreturn => "rt_sigreturn",
            libc::SYS_sigaltstack => "sigaltstack",
            other => return format!("system call {other}"),
        };
        name.to_owned()
    }

    fn request_of(request: u32) -> String {
        match request {
            0xC020_AA00 => "REGISTER",
            0x8010_AA01 => "UNREGISTER",
            0x8010_AA02 => "WAKE",
            0xC028_AA03 => "COPY",
            0xC020_AA04 => "ZEROPAGE",
            0xC028_AA05 => "MOVE",
            0xC018_AA06 => "WRITEPROTECT",
            0xC020_AA08 => "POISON",
            0xC060_6610 => "PAGEMAP_SCAN",
            0xC068_6611 => "PROCMAP_QUERY",
            other => return format!("ioctl {other:#x}"),
        }
        .to_owned()
    }
}
