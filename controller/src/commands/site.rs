//! `baton site`: tests a site, runs commands there and transfers files.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use baton_common::config::{Config, Launcher, Site, Transport};
use baton_common::digest::Digest;
use baton_common::exit;
use baton_worker::transport::{Error, Session, connect, quote, quote_path};
use serde_json::{Value, json};

use crate::cli::site::{SiteCommand, SiteExecArguments, SiteGetArguments, SitePutArguments};
use crate::cli::{Global, Output};
use crate::failure::Failure;
use crate::output;

/// Time limit of a small command at a site. A login node with many users needs seconds.
const STEP_LIMIT: Duration = Duration::from_secs(60);

/// Content of the file that the test sends and fetches.
const PROBE: &[u8] = b"a file of `baton site test`\n";

pub(crate) async fn run(global: &Global, command: SiteCommand) -> Result<u8, Failure> {
    let config = global.connection.resolve()?.config;
    match command {
        SiteCommand::Test { site } => test(global, &config, &site).await,
        SiteCommand::Exec(arguments) => exec(&config, arguments).await,
        SiteCommand::Put(arguments) => put(&config, arguments).await,
        SiteCommand::Get(arguments) => get(&config, arguments).await,
    }
}

fn site<'a>(config: &'a Config, name: &str) -> Result<&'a Site, Failure> {
    config.sites.get(name).ok_or_else(|| {
        let names: Vec<_> = config.sites.keys().map(String::as_str).collect();
        let known = if names.is_empty() {
            "no sites are configured".to_owned()
        } else {
            format!("configured sites: {}", names.join(", "))
        };
        Failure::new(exit::NOT_FOUND, format!("the configuration has no site `{name}`"))
            .with_remedy(format!("{known}; add a section [sites.NAME] to baton.toml"))
    })
}

/// Opens a session for this command, apart from the sessions of the workers.
pub(super) async fn open(config: &Config, site: &Site) -> Result<Session, Failure> {
    match &site.transport {
        Transport::Local => Ok(Session::local()),
        Transport::Ssh(name) => match config.ssh.get(name) {
            Some(section) => Ok(connect(section).await?),
            None => Err(Failure::usage(format!("the configuration has no section [ssh.{name}]"))),
        },
    }
}

/// Returns a path at the site. A relative path starts at the root of the site, which may be relative to the home folder.
pub(super) fn there(site: &Site, path: &str) -> String {
    if path.starts_with('/') { path.to_owned() } else { format!("{}/{path}", site.root_from_home()) }
}

async fn exec(config: &Config, arguments: SiteExecArguments) -> Result<u8, Failure> {
    let session = open(config, site(config, &arguments.site)?).await?;
    let command = match &arguments.command[..] {
        [line] => line.clone(),
        words => words.iter().map(|word| quote(word)).collect::<Vec<_>>().join(" "),
    };
    let ran = session.exec(&command, b"", arguments.timeout).await?;
    session.close().await;
    std::io::stdout().write_all(&ran.stdout)?;
    std::io::stderr().write_all(&ran.stderr)?;
    match ran.exit {
        // POSIX exit codes fit into a byte.
        Some(code) => Ok(u8::try_from(code).unwrap_or(exit::FAILED)),
        None => Err(Failure::failed(format!("the command was ended by signal {}", ran.signal.unwrap_or_default()))),
    }
}

async fn put(config: &Config, arguments: SitePutArguments) -> Result<u8, Failure> {
    let site = site(config, &arguments.site)?;
    let size = arguments.from.metadata().map_err(|error| unreadable(&arguments.from, &error))?.len();
    let mut to = there(site, &arguments.to);
    if to.ends_with('/') {
        let name = arguments.from.file_name().and_then(|name| name.to_str());
        to.push_str(name.ok_or_else(|| Failure::usage(format!("{} has no name", arguments.from.display())))?);
    }
    let session = open(config, site).await?;
    if let Some((folder, _)) = to.rsplit_once('/').filter(|(folder, _)| !folder.is_empty()) {
        session.exec(&format!("mkdir -p {}", quote_path(folder)), b"", STEP_LIMIT).await?.ok()?;
    }
    let bar = output::progress_bar(size, "sent");
    let progress = |bytes| bar.set_position(bytes);
    let sending = async { Ok::<_, Failure>(session.put(&arguments.from, &to, &progress).await?) };
    let (there, digest) = tokio::try_join!(sending, digest_here(&arguments.from))?;
    bar.finish_and_clear();
    if there != digest {
        session.exec(&format!("rm -f {}", quote_path(&to)), b"", STEP_LIMIT).await?.ok()?;
        return Err(damaged(&to));
    }
    session.close().await;
    Ok(exit::OK)
}

async fn get(config: &Config, arguments: SiteGetArguments) -> Result<u8, Failure> {
    let site = site(config, &arguments.site)?;
    let from = there(site, &arguments.from);
    let mut to = arguments.to;
    if to.is_dir() {
        to.push(from.rsplit('/').next().unwrap_or(&from));
    }
    let session = open(config, site).await?;
    let size = session.size(&from).await?;
    let bar = output::progress_bar(size, "fetched");
    let progress = |bytes| bar.set_position(bytes);
    let (digest, came) = session.get_unless(&from, size, &to, &progress, async |_| Ok::<_, Error>(false)).await?;
    bar.finish_and_clear();
    if came != Some(digest) {
        std::fs::remove_file(&to)?;
        return Err(damaged(&to.display().to_string()));
    }
    session.close().await;
    Ok(exit::OK)
}

fn damaged(path: &str) -> Failure {
    Failure::failed(format!("{path} differed from the source after the transfer and was removed")).with_remedy(
        "the source may have changed, or an earlier transfer left part of another file; run the command again",
    )
}

async fn digest_here(path: &Path) -> Result<Digest, Failure> {
    let read = path.to_owned();
    let read = tokio::task::spawn_blocking(move || Digest::of_file(&read)).await;
    let digest = read.map_err(std::io::Error::other).and_then(|digest| digest);
    digest.map(|(digest, _)| digest).map_err(|error| unreadable(path, &error))
}

fn unreadable(path: &Path, error: &std::io::Error) -> Failure {
    Failure::failed(format!("{}: {error}", path.display()))
}

/// One step of a test, with its result.
struct Step {
    what: &'static str,
    took: Duration,
    result: Result<String, String>,
}

/// The steps of a test, in order.
#[derive(Default)]
struct Steps(Vec<Step>);

impl Steps {
    /// Runs one step and records its result. Returns whether it succeeded.
    async fn step(&mut self, what: &'static str, trial: impl Future<Output = Result<String, Error>>) -> bool {
        let started = Instant::now();
        let result = trial.await.map_err(|error| error.to_string());
        let is_ok = result.is_ok();
        self.0.push(Step { what, took: started.elapsed(), result });
        is_ok
    }
}

async fn test(global: &Global, config: &Config, name: &str) -> Result<u8, Failure> {
    let site = site(config, name)?;
    let mut steps = Steps::default();
    let mut session = None;
    let way = match &site.transport {
        Transport::Local => "this machine".to_owned(),
        Transport::Ssh(section) => format!("[ssh.{section}]"),
    };
    let started = Instant::now();
    match open(config, site).await {
        Ok(opened) => {
            steps.0.push(Step { what: "connect", took: started.elapsed(), result: Ok(way) });
            session = Some(opened);
        }
        Err(failure) => {
            let result = Err(failure.text().to_owned());
            steps.0.push(Step { what: "connect", took: started.elapsed(), result });
        }
    }
    if let Some(session) = &session {
        try_all(session, site, &mut steps).await;
        session.close().await;
    }
    print(global, &steps.0)?;
    let is_all_ok = session.is_some() && steps.0.iter().all(|step| step.result.is_ok());
    Ok(if is_all_ok { exit::OK } else { exit::FAILED })
}

async fn try_all(session: &Session, site: &Site, steps: &mut Steps) {
    let said = async |command: &str| -> Result<String, Error> {
        let output = session.exec(command, b"", STEP_LIMIT).await?.ok()?;
        Ok(output::one_line(&String::from_utf8_lossy(&output), 100))
    };
    steps.step("command", said("true; uname -sm")).await;
    let shell = async {
        let mut shell = session.shell().await?;
        shell.run("true", STEP_LIMIT).await?.ok()?;
        Ok(String::new())
    };
    steps.step("shell", shell).await;
    let root = site.root_from_home();
    let make = format!("mkdir -p {0} && cd {0} && pwd", quote_path(root));
    if steps.step("root", said(&make)).await {
        steps.step("files", files(session, root)).await;
    }
    steps
        .step(
            "tools",
            said("for t in tar sha256sum timeout; do command -v $t || { echo $t is missing >&2; exit 1; }; done"),
        )
        .await;
    match site.launcher {
        Launcher::Fork => {}
        Launcher::Slurm => {
            steps.step("sbatch", said("sbatch --version")).await;
            steps.step("squeue", said("squeue --version")).await;
            steps.step("scancel", said("scancel --version")).await;
        }
    }
}

/// Sends a file to the site and fetches it.
async fn files(session: &Session, root: &str) -> Result<String, Error> {
    let here = Scratch::new()?;
    let name = format!("{root}/baton-site-test-{}", std::process::id());
    let sent = here.file("sent")?;
    let back = here.0.join("back");
    session.put(&sent, &name, &|_| ()).await?;
    let got = session.get(&name, &back, &|_| ()).await;
    session.exec(&format!("rm -f {0}", quote_path(&name)), b"", STEP_LIMIT).await?.ok()?;
    got?;
    match std::fs::read(&back) {
        Ok(content) if content == PROBE => Ok(String::new()),
        Ok(_) | Err(_) => Err(Error::File {
            path: name,
            reason: "the fetched file differs from the sent one".to_owned(),
            errno: None,
        }),
    }
}

/// A local folder that is removed after the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self, Error> {
        let folder = std::env::temp_dir().join(format!("baton-site-test-{}", uuid::Uuid::new_v4()));
        match std::fs::create_dir(&folder) {
            Ok(()) => Ok(Self(folder)),
            Err(error) => Err(Error::File {
                path: folder.display().to_string(),
                reason: error.to_string(),
                errno: error.raw_os_error(),
            }),
        }
    }

    fn file(&self, name: &str) -> Result<PathBuf, Error> {
        let file = self.0.join(name);
        match std::fs::write(&file, PROBE) {
            Ok(()) => Ok(file),
            Err(error) => Err(Error::File {
                path: file.display().to_string(),
                reason: error.to_string(),
                errno: error.raw_os_error(),
            }),
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // A leftover in a temporary folder does not fail the test.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn print(global: &Global, steps: &[Step]) -> Result<(), Failure> {
    let word = |step: &Step| if step.result.is_ok() { "ok" } else { "fail" };
    let text = |step: &Step| match &step.result {
        Ok(text) | Err(text) => text.clone(),
    };
    if global.output == Output::Json {
        let values = steps.iter().map(|step| {
            json!({
                "what": step.what,
                "verdict": word(step),
                "text": text(step),
                "took_ms": u64::try_from(step.took.as_millis()).unwrap_or(u64::MAX),
            })
        });
        return output::print_json(&Value::Array(values.collect()));
    }
    for step in steps {
        let took = output::seconds(step.took);
        output::print(format!("{:<5} {:<8} {took:>8}  {}", word(step), step.what, text(step)).trim_end())?;
    }
    Ok(())
}
