//! Traces a process, and is the other side in it.

use std::collections::HashMap;
use std::ops::Range;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;
use std::{env, fs, io, thread};

use tests::{Watchdog, usable};

/// System calls by name; ioctls by the name of the request; signals by theirs.
pub(crate) type Calls = &'static [&'static str];

/// Of each thread that asked for something, in the order of their names, what: the thread that makes the step is `caller`.
pub(crate) type ByThread = &'static [(&'static str, Calls)];

/// What was found.
type Step = Vec<(String, Vec<String>)>;

/// In the environment of a traced process: the test that it is to run.
const MARK: &str = "SVM_TEST_TRACED";

const BEGIN: libc::c_long = 0x5356_0001;
const END: libc::c_long = 0x5356_0002;
const REST: libc::c_long = 0x5356_0003;

fn mark(what: libc::c_long) {
    // SAFETY: no such operation exists: an error, which nobody but a tracer sees.
    unsafe { libc::syscall(libc::SYS_prctl, what, 0, 0, 0, 0) };
}

/// In the traced process: what `job` asks of the kernel is on the list.
pub(crate) fn step(job: impl FnOnce()) {
    mark(BEGIN);
    job();
    mark(END);
}

/// In the traced process: goes on when all other threads sleep.
pub(crate) fn rest() {
    mark(REST);
}

/// Runs `body` under a tracer; its steps must have asked of the kernel what `expected` says, by thread. `test` is the test's name.
pub(crate) fn traced(test: &'static str, body: impl FnOnce(), expected: &[ByThread]) {
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
    let Ok(mut steps) = Tracer::new(child.id().cast_signed()).run() else {
        // It is stopped, and nobody is to let it go on.
        child.kill().unwrap();
        child.wait().unwrap();
        tests::skip("the kernel does not say what system call a process is in");
        return;
    };
    let mut said = String::new();
    io::Read::read_to_string(&mut child.stdout.take().unwrap(), &mut said).unwrap();
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
    /// Of each thread whose last call was an mmap what that has mapped, or is to.
    mapped: HashMap<libc::pid_t, Range<u64>>,
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
            mapped: HashMap::new(),
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
            // Not those of other threads of ours, whose tests trace processes of their own. While nobody is at a mark nothing is waited for
            // but the next stop; else it is for the others to sleep, of which no stop tells.
            let polls = if self.held.is_some() {
                libc::WNOHANG
            } else {
                0
            };
            let flags = libc::__WALL | libc::__WNOTHREAD | polls;
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
        if ptrace(libc::PTRACE_SETOPTIONS, tid, 0, options) != 0 {
            return Err(Refused);
        }
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
                // SAFETY: on exit this is the part that the kernel has filled in.
                let exit = unsafe { info.u.exit };
                if let Some(mapped) = self.mapped.get_mut(&tid).filter(|m| m.start == 0) {
                    *mapped = exit.sval.cast_unsigned()..exit.sval.cast_unsigned() + mapped.end;
                }
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
                if nr == libc::SYS_prctl && (BEGIN..=REST).contains(&(args[0] as libc::c_long)) {
                    assert!(self.held.is_none(), "two threads at marks");
                    self.held = Some((tid, args[0] as libc::c_long));
                    return Ok(());
                }
                if !self.is_trim(tid, nr, args) {
                    self.mapped.remove(&tid);
                    if nr == libc::SYS_mmap {
                        self.mapped.insert(tid, 0..args[1]);
                    }
                    self.note(tid, name_of(nr, args));
                }
            }
            resume(tid, 0);
        } else if status >> 16 != 0 {
            self.expect_made_by(tid);
            resume(tid, 0);
        } else if signal == libc::SIGSTOP {
            // A thread that has been made.
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

    /// Counts the thread that `tid` has just made among those that do not sleep, though it may be long before it runs and stops for the first
    /// time. If it has ended already nothing more is heard of it.
    fn expect_made_by(&mut self, tid: libc::pid_t) {
        let mut made: libc::c_ulong = 0;
        let place = (&raw mut made).expose_provenance();
        if ptrace(libc::PTRACE_GETEVENTMSG, tid, 0, place) == 0 {
            let made = made as libc::pid_t;
            if self.state_of(made).is_some() {
                self.threads.entry(made).or_insert(At::User);
            }
        }
    }

    /// Whether the thread unmaps a part of what it has just mapped: where alignment is wanted the ends are cut off, and it is chance, or
    /// the kernel's choice, which of them there are.
    fn is_trim(&self, tid: libc::pid_t, nr: libc::c_long, args: [u64; 6]) -> bool {
        nr == libc::SYS_munmap
            && self.mapped.get(&tid).is_some_and(|mapped| {
                let part = args[0]..args[0] + args[1];
                mapped.start <= part.start && part.end <= mapped.end && part != *mapped
            })
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

/// All that this thread and those it makes do, they do on the first CPU that they may have.
fn stay_on_one_cpu() {
    // SAFETY: a set of bits, of which all zero is one; asked for and set for this thread.
    unsafe {
        let mut cpus: libc::cpu_set_t = std::mem::zeroed();
        assert_eq!(
            libc::sched_getaffinity(0, size_of_val(&cpus), &raw mut cpus),
            0
        );
        let first = (0..libc::CPU_SETSIZE as usize).find(|&cpu| libc::CPU_ISSET(cpu, &cpus));
        let mut one: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(first.unwrap(), &mut one);
        assert_eq!(
            libc::sched_setaffinity(0, size_of_val(&one), &raw const one),
            0
        );
    }
}

/// A thread that has been made and has not run yet does not sleep either: what it does first is no part of a step. Others compute on its CPU,
/// so that it waits for it.
#[test]
fn a_step_begins_when_threads_that_were_just_made_sleep() {
    const THREADS: usize = 12;
    let is_over = AtomicBool::new(env::var_os(MARK).is_some());
    thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                stay_on_one_cpu();
                while !is_over.load(Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        let _stop = Stop(&is_over);
        traced(
            "tracer::a_step_begins_when_threads_that_were_just_made_sleep",
            || {
                stay_on_one_cpu();
                for _ in 0..THREADS {
                    let made = thread::spawn(thread::park);
                    step(|| ());
                    made.thread().unpark();
                    made.join().unwrap();
                }
            },
            &[&[] as ByThread; THREADS],
        );
    });
}

/// Ends the computing, also if a check fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}
