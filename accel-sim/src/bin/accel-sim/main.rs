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
//! input or the command line is bad. The report goes to standard output, complaints and progress to
//! standard error; progress only to a terminal.

mod cli;
mod graph;
mod input;
mod kernels;
mod oracle;
mod report;
mod workload;

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
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
            if error.is::<input::Error>() {
                ExitCode::from(BAD_INPUT)
            } else {
                ExitCode::FAILURE
            }
        }
    }
}

fn run(command: &Command) -> anyhow::Result<ExitCode> {
    let (summary, json) = match command {
        Command::Run(Workload::Pagerank(args)) => (workload::pagerank(args)?, &args.common.json),
        Command::Run(Workload::Saxpy(args)) => (workload::saxpy(args)?, &args.common.json),
        Command::Run(Workload::List(args)) => (workload::list(args)?, &args.common.json),
        Command::Doctor => return doctor(),
    };
    if let Some(path) = json {
        write_json(&summary, path).with_context(|| format!("cannot write {}", path.display()))?;
    }
    print(&summary.render())?;
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
    print(&format!("{capabilities}\n{verdict}\n"))?;
    Ok(if usable {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Writes to standard output; unlike `print!` it does not panic when the reader has gone.
fn print(text: &str) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    let written = stdout.write_all(text.as_bytes());
    written
        .and_then(|()| stdout.flush())
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

fn write_json(summary: &Summary, path: &Path) -> io::Result<()> {
    summary.write_json(BufWriter::new(File::create(path)?))
}
