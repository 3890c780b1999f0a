//! `baton open`: opens a shell in the folder of a process.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use baton_common::config::{Config, Transport};
use baton_common::exit;
use baton_worker::cli::host_name;
use baton_worker::transport::quote;

use crate::cli::{Global, OpenArguments};
use crate::client::{Client, absent, read_ids};
use crate::failure::Failure;
use crate::output;

pub(crate) async fn run(global: &Global, arguments: OpenArguments) -> Result<u8, Failure> {
    let pids = read_ids(std::slice::from_ref(&arguments.pid))?;
    let &[pid] = pids.as_slice() else {
        return Err(Failure::usage("expected exactly one process id"));
    };
    let client = Client::open(global).await?;
    let details = client.store.show(pid).await?.ok_or_else(|| absent(pid))?;
    client.close().await;
    let on_site = details.spec.as_ref().and_then(|spec| spec.on_site.as_ref());
    let argv = match on_site {
        Some(on_site) => {
            let config = global.connection.resolve()?.config;
            at_site(&config, &on_site.at, &format!("p/{pid}/{}", details.summary.try_number))?
        }
        None => here(details.summary.outcome.as_ref().and_then(|outcome| outcome.sandbox.as_deref()))?,
    };
    if arguments.print {
        output::print(&argv.iter().map(|word| quote(word)).collect::<Vec<_>>().join(" "))?;
        return Ok(exit::OK);
    }
    // `exec` replaces this program; it returns only if it fails.
    let failure = Command::new(&argv[0]).args(&argv[1..]).exec();
    Err(Failure::failed(format!("cannot run {}: {failure}", argv[0])))
}

/// Returns the command that opens a shell in a folder below the root of a site.
fn at_site(config: &Config, name: &str, folder: &str) -> Result<Vec<String>, Failure> {
    let missing = |what: String| {
        Failure::new(exit::NOT_FOUND, what).with_remedy("copy the section from the configuration of the workers")
    };
    let site = config.sites.get(name).ok_or_else(|| missing(format!("the configuration has no site `{name}`")))?;
    let folder = quote(&format!("{}/{folder}", site.root_from_home()));
    let shell = format!("cd && cd {folder} && exec \"${{SHELL:-/bin/sh}}\"");
    let Transport::Ssh(section) = &site.transport else {
        return Ok(vec!["/bin/sh".into(), "-c".into(), shell]);
    };
    let ssh =
        config.ssh.get(section).ok_or_else(|| missing(format!("the configuration has no section [ssh.{section}]")))?;
    let mut argv = vec!["ssh".to_owned(), "-t".to_owned()];
    let mut option = |name: &str, value: Option<String>| {
        argv.extend(value.into_iter().flat_map(|value| [name.to_owned(), value]));
    };
    option("-F", ssh.config.as_deref().map(|path| from_home(path).display().to_string()));
    option("-p", ssh.port.map(|port| port.to_string()));
    option("-i", ssh.key.as_ref().map(|path| path.display().to_string()));
    option("-l", ssh.user.clone());
    option("-J", ssh.jump.clone());
    option("-o", ssh.known_hosts.as_ref().map(|path| format!("UserKnownHostsFile={}", path.display())));
    // Every login shell splits this into the same words.
    argv.extend([ssh.host.clone(), format!("exec /bin/sh -c {}", quote(&shell))]);
    Ok(argv)
}

/// Expands `~/`. OpenSSH expands it for keys and known hosts, but not for its configuration file.
fn from_home(path: &Path) -> PathBuf {
    match (path.strip_prefix("~"), std::env::home_dir()) {
        (Ok(rest), Some(home)) => home.join(rest),
        (Ok(_) | Err(_), _) => path.to_owned(),
    }
}

/// Returns the command that opens a shell in a sandbox on this machine, `HOST:PATH`.
fn here(sandbox: Option<&str>) -> Result<Vec<String>, Failure> {
    let (host, path) = sandbox.and_then(|sandbox| sandbox.split_once(':')).ok_or_else(|| {
        Failure::new(exit::CONFLICT, "the folder of the process is unknown")
            .with_remedy("the folder of a local program is known once the process has ended")
    })?;
    if host != host_name() {
        return Err(Failure::new(
            exit::CONFLICT,
            format!("the folder of the process is on another machine: {host}:{path}"),
        ));
    }
    Ok(vec!["/bin/sh".into(), "-c".into(), format!("cd {} && exec \"${{SHELL:-/bin/sh}}\"", quote(path))])
}
