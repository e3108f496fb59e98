//! Threads of our own, also in a forked child.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

/// Whether this is a forked child.
static IS_CHILD: AtomicBool = AtomicBool::new(false);

/// From now on threads are started as a forked child must.
pub(crate) fn enter_child() {
    IS_CHILD.store(true, Ordering::Relaxed);
}

/// A thread, which is left to itself if this is dropped.
#[derive(Debug)]
pub(crate) struct Thread(Option<Kind>);

#[derive(Debug)]
enum Kind {
    Std(JoinHandle<()>),
    Raw(libc::pthread_t),
}

/// Starts a thread. A thread of `std`'s takes a lock of the process as it starts, which in the parent another thread may have had at the
/// moment of the fork: in a forked child it might never get on. There it is one of the C library's, which is made for that; what it
/// lacks is the message for a stack that has overflowed.
pub(crate) fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<Thread> {
    if !IS_CHILD.load(Ordering::Relaxed) {
        let thread = std::thread::Builder::new().name(name.into());
        return thread
            .spawn(body)
            .map(|thread| Thread(Some(Kind::Std(thread))));
    }
    let name = std::ffi::CString::new(name)?;
    let body: Body = Box::new(move || {
        // SAFETY: no preconditions.
        let this = unsafe { libc::pthread_self() };
        // SAFETY: a string that ends with zero; one that is too long is refused.
        unsafe { libc::pthread_setname_np(this, name.as_ptr()) };
        body();
    });
    start(body).map(|thread| Thread(Some(Kind::Raw(thread))))
}

type Body = Box<dyn FnOnce() + Send>;

extern "C" fn run(body: *mut libc::c_void) -> *mut libc::c_void {
    // SAFETY: `start` made it of a box, for this thread alone.
    let body = unsafe { Box::from_raw(body.cast::<Body>()) };
    // As of a thread of `std`: what it panics with was printed, and is nobody's business else.
    if let Err(payload) = catch_unwind(AssertUnwindSafe(body)) {
        std::mem::forget(payload);
    }
    std::ptr::null_mut()
}

fn start(body: Body) -> io::Result<libc::pthread_t> {
    let body = Box::into_raw(Box::new(body));
    let mut thread = 0;
    // SAFETY: `run` takes the body over, if it runs; the rest the call only writes.
    let errno =
        unsafe { libc::pthread_create(&raw mut thread, std::ptr::null(), run, body.cast()) };
    if errno != 0 {
        // SAFETY: no thread has it.
        drop(unsafe { Box::from_raw(body) });
        return Err(io::Error::from_raw_os_error(errno));
    }
    Ok(thread)
}

impl Thread {
    /// Waits until it has ended.
    pub(crate) fn join(mut self) {
        match self.0.take() {
            Some(Kind::Std(thread)) => {
                // What it panicked with was printed.
                let _ = thread.join();
            }
            Some(Kind::Raw(thread)) => {
                // SAFETY: a thread that was neither joined nor detached.
                unsafe { libc::pthread_join(thread, std::ptr::null_mut()) };
            }
            None => {}
        }
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        if let Some(Kind::Raw(thread)) = self.0 {
            // SAFETY: a thread that was neither joined nor detached.
            unsafe { libc::pthread_detach(thread) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    /// By either way a thread runs what it was given, once, and is waited for, also when it panics.
    #[test]
    fn a_thread_runs_its_body_in_a_child_as_anywhere() {
        let (sender, receiver) = mpsc::channel();
        let body = |sender: mpsc::Sender<u32>| move || sender.send(7).unwrap();
        Thread(Some(Kind::Raw(
            start(Box::new(body(sender.clone()))).unwrap(),
        )))
        .join();
        spawn("of std", body(sender)).unwrap().join();
        assert_eq!(receiver.iter().collect::<Vec<_>>(), [7, 7]);
        let panics = start(Box::new(|| panic!("as it is to")));
        Thread(Some(Kind::Raw(panics.unwrap()))).join();
    }
}
