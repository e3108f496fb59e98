//! `accel-sim`: run a workload on the simulated accelerator, in place, and prove the result.
//!
//! ```text
//! accel-sim run pagerank --input Cargo.lock
//! accel-sim run saxpy --n 1000000
//! accel-sim run list --workers 2
//! accel-sim doctor
//! ```
//!
//! A run goes one way: an [`input`] is read or generated, laid out in memory that the device
//! shares, worked on by one of the [`kernels`], judged against an [`oracle`] that shares no code
//! with it, and told in a [`report`]. [`workload`] is that way, once for each of the three.
//!
//! Exit status: 0 if the result is verified, 1 if it is not or could not be computed, 2 if the
//! input or the command line is bad. The report goes to standard output (or, with `--json -`, its JSON
//! does, and it to standard error), complaints and progress to standard error; progress only to a
//! terminal.

mod cli;
mod graph;
mod input;
mod kernels;
mod oracle;
mod report;
mod workload;

use std::fmt;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;

use cli::{Cli, Command, Workload};
use report::Summary;

/// The exit status for bad input; clap uses the same for a bad command line.
const BAD_INPUT: u8 = 2;

fn main() -> ExitCode {
    match run(&Cli::parse().command) {
        Ok(status) => status,
        Err(error) => {
            eprintln!("accel-sim: {}", told(&error));
            if is_bad_input(&error) {
                ExitCode::from(BAD_INPUT)
            } else {
                ExitCode::FAILURE
            }
        }
    }
}

/// Whether it is what was asked for that cannot be done.
fn is_bad_input(error: &anyhow::Error) -> bool {
    // How much the workers hold at once is known when they are launched, and not from the command line alone.
    let is_too_little = matches!(
        error.downcast_ref(),
        Some(accel_sim::Error::DeviceMemoryTooSmall { .. })
    );
    error.is::<input::Error>() || error.is::<Unwritable>() || is_too_little
}

fn run(command: &Command) -> anyhow::Result<ExitCode> {
    let Command::Run(workload) = command else {
        return doctor();
    };
    let json = workload.common().json.as_deref().map(Json::create);
    let json = json.transpose()?;
    let summary = match workload {
        Workload::Pagerank(args) => workload::pagerank(args)?,
        Workload::Saxpy(args) => workload::saxpy(args)?,
        Workload::List(args) => workload::list(args)?,
    };
    let report = summary.render();
    let to_stderr = matches!(json, Some(Json::Stdout));
    // If one of the two cannot be written there is the other.
    let written = json.map_or(Ok(()), |json| json.write(&summary));
    if to_stderr {
        print(io::stderr().lock(), &report)?;
    } else {
        print(io::stdout().lock(), &report)?;
    }
    written?;
    match summary.failures() {
        None => Ok(ExitCode::SUCCESS),
        Some(failures) => anyhow::bail!("not verified: {failures}"),
    }
}

/// Says what this machine lets us do, and what is done about the rest.
fn doctor() -> anyhow::Result<ExitCode> {
    let capabilities = svm::Capabilities::probe();
    let usable = capabilities.is_usable();
    let verdict = if usable {
        "memory can be mirrored here"
    } else {
        "memory can NOT be mirrored here"
    };
    print(io::stdout().lock(), &format!("{capabilities}\n{verdict}\n"))?;
    Ok(if usable {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Writes to standard output or standard error; unlike `print!` it does not panic when the reader has
/// gone.
fn print(mut to: impl Write, text: &str) -> anyhow::Result<()> {
    let written = to.write_all(text.as_bytes());
    written
        .and_then(|()| to.flush())
        .context("cannot write the report")
}

/// An error and its causes in one line, without those that the text before already tells.
fn told(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.ends_with(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// Where the report goes as JSON.
enum Json<'a> {
    Stdout,
    File(File, &'a Path),
}

/// The file for the JSON cannot be had; found before anything runs.
#[derive(Debug)]
struct Unwritable {
    path: PathBuf,
    source: io::Error,
}

impl<'a> Json<'a> {
    /// Creates the file, if it is not there. What is in it is left until there is something to put in its place: it may be the input, or a run
    /// before this, which fails.
    fn create(path: &'a Path) -> Result<Self, Unwritable> {
        if path == "-" {
            return Ok(Json::Stdout);
        }
        match File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
        {
            Ok(file) => Ok(Json::File(file, path)),
            Err(source) => Err(Unwritable {
                path: path.to_owned(),
                source,
            }),
        }
    }

    fn write(self, summary: &Summary) -> anyhow::Result<()> {
        match self {
            Json::Stdout => summary
                .write_json(BufWriter::new(io::stdout().lock()))
                .context("cannot write the report as JSON"),
            Json::File(file, path) => emptied(&file)
                .and_then(|()| Ok(summary.write_json(BufWriter::new(file))?))
                .with_context(|| format!("cannot write {}", path.display())),
        }
    }
}

/// Empties a file that can be; what is no file, such as a pipe, cannot, and has nothing to be rid of.
fn emptied(file: &File) -> anyhow::Result<()> {
    if file.metadata()?.is_file() {
        file.set_len(0)?;
    }
    Ok(())
}

impl fmt::Display for Unwritable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot write {}: {}", self.path.display(), self.source)
    }
}

// `Display` says all of it, as with `input::Error`.
impl std::error::Error for Unwritable {}
