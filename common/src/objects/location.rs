//! The location of the store: opens the folder or bucket of the configuration.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::local::LocalFileSystem;
use object_store::path::Path as Key;
use object_store::{ClientConfigKey, ClientOptions, ObjectStore, RetryConfig};

use super::{DEFAULT_FOLDER, Error, file_url};
use crate::config;
use crate::secrets;

/// Time limit for a connection to the server.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Time limit without data from the server, and for one part of an object: 8 MiB at half a megabit per second.
const READ_TIMEOUT: Duration = Duration::from_secs(120);

/// Most retries, and their time limit, of a request without an answer. Callers retry themselves, too.
const RETRIES_MAX: usize = 4;
const RETRY_TIMEOUT: Duration = Duration::from_secs(30);

/// A folder or a bucket.
pub(super) enum Location {
    Folder(PathBuf),
    Bucket {
        name: String,
        prefix: Key,
        /// The server, for people; empty for AWS.
        endpoint: String,
    },
}

impl Location {
    /// The prefix of every key.
    pub(super) fn prefix(&self) -> Key {
        match self {
            Location::Folder(_) => Key::default(),
            Location::Bucket { prefix, .. } => prefix.clone(),
        }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Location::Folder(path) => write!(f, "{}", path.display()),
            Location::Bucket { name, endpoint, .. } if endpoint.is_empty() => write!(f, "bucket `{name}`"),
            Location::Bucket { name, endpoint, .. } => write!(f, "bucket `{name}` at {endpoint}"),
        }
    }
}

/// The folder that the configuration names; `None` for a bucket.
pub(super) fn folder(config: &config::Objects) -> Result<Option<PathBuf>, Error> {
    let url = config.url.as_deref().unwrap_or(DEFAULT_FOLDER);
    let path = match url.split_once("://") {
        None => url,
        Some(("file", path)) if path.starts_with('/') => {
            let path = file_url::to_path(path);
            return path
                .map(Some)
                .ok_or_else(|| wrong("`objects.url` has a `%` without two hexadecimal digits after it"));
        }
        Some(("s3", _)) => return Ok(None),
        Some(_) => return Err(wrong("`objects.url` must be a folder, file:///FOLDER, or s3://BUCKET/PREFIX")),
    };
    if path.is_empty() {
        return Err(wrong("`objects.url` is empty; set a folder, or s3://BUCKET/PREFIX"));
    }
    config::from_home(Path::new(path)).map(Some).map_err(|problem| wrong(&format!("`objects.url` {problem}")))
}

/// Moves a file within a file system, durably and with a new modification time. Returns false if it cannot be moved.
pub(super) fn move_durably(from: &Path, to: &Path) -> std::io::Result<bool> {
    let folder = to.parent().unwrap_or(Path::new("/"));
    std::fs::create_dir_all(folder)?;
    let file = std::fs::File::options().write(true).open(from)?;
    file.set_modified(std::time::SystemTime::now())?;
    file.sync_all()?;
    if std::fs::rename(from, to).is_err() {
        return Ok(false);
    }
    for folder in folder.ancestors().take(3) {
        std::fs::File::open(folder)?.sync_all()?;
    }
    Ok(true)
}

/// Opens the store. A folder must exist.
pub(super) fn open(config: &config::Objects) -> Result<(Arc<dyn ObjectStore>, Location), Error> {
    let Some(path) = folder(config)? else {
        let url = config.url.as_deref().unwrap_or_default();
        return bucket(config, url.trim_start_matches("s3://"));
    };
    let whole = path.canonicalize().map_err(|source| Error::Folder { path, source })?;
    let store = LocalFileSystem::new_with_prefix(&whole)
        .map_err(|error| super::error::of_store(error, &Location::Folder(whole.clone())))?
        .with_fsync(true);
    Ok((Arc::new(store), Location::Folder(whole)))
}

fn bucket(config: &config::Objects, path: &str) -> Result<(Arc<dyn ObjectStore>, Location), Error> {
    let (name, prefix) = path.split_once('/').unwrap_or((path, ""));
    let is_name = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || ".-_".contains(c));
    if !is_name {
        return Err(wrong(
            "`objects.url` names no bucket; set s3://BUCKET/PREFIX, and the server in `objects.endpoint`",
        ));
    }
    let prefix = Key::parse(prefix.trim_matches('/'))
        .map_err(|_| wrong("the prefix in `objects.url` has an empty component"))?;
    // An error means that a provider is installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();

    let mut builder = AmazonS3Builder::from_env().with_bucket_name(name).with_disable_bulk_delete(true);
    for (name, value) in secrets::keys() {
        if let Ok(key) = name.to_ascii_lowercase().parse::<AmazonS3ConfigKey>() {
            builder = builder.with_config(key, value);
        }
    }
    if let Some(endpoint) = &config.endpoint {
        // The second overrides the first, and the environment may have set either.
        builder = builder.with_endpoint(endpoint).with_config(AmazonS3ConfigKey::S3Endpoint, endpoint);
    }
    if let Some(region) = &config.region {
        builder = builder.with_region(region);
    }
    let value = |key| builder.get_config_value(&key).filter(|value| !value.is_empty());
    let endpoint = value(AmazonS3ConfigKey::S3Endpoint).or_else(|| value(AmazonS3ConfigKey::Endpoint));
    let endpoint = endpoint.unwrap_or_default();
    if endpoint.contains('@') {
        return Err(wrong("`objects.endpoint` must not contain keys; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"));
    }
    let has_keys = [
        AmazonS3ConfigKey::AccessKeyId,
        AmazonS3ConfigKey::WebIdentityTokenFile,
        AmazonS3ConfigKey::ContainerCredentialsRelativeUri,
        AmazonS3ConfigKey::ContainerCredentialsFullUri,
    ]
    .into_iter()
    .any(|key| value(key).is_some());
    // AWS provides keys to its own machines; any other server needs keys.
    if !endpoint.is_empty() && !has_keys {
        return Err(wrong("no keys for `objects.url`; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"));
    }
    let may_be_plain = value(AmazonS3ConfigKey::Client(ClientConfigKey::AllowHttp)).as_deref() == Some("true");
    if endpoint.starts_with("http://") && !is_loopback(&endpoint) && !may_be_plain {
        return Err(wrong(&format!(
            "`{endpoint}` is not encrypted; use https://, or set AWS_ALLOW_HTTP=true in a trusted network"
        )));
    }
    let options = ClientOptions::new()
        .with_allow_http(endpoint.starts_with("http://"))
        .with_connect_timeout(CONNECT_TIMEOUT)
        .with_read_timeout(READ_TIMEOUT)
        // A large object may take any time.
        .with_timeout_disabled();
    let retry = RetryConfig { max_retries: RETRIES_MAX, retry_timeout: RETRY_TIMEOUT, ..RetryConfig::default() };
    let store = builder
        .with_client_options(options)
        .with_retry(retry)
        .build()
        .map_err(|error| wrong(&format!("invalid `objects`: {error}")))?;
    Ok((Arc::new(store), Location::Bucket { name: name.to_owned(), prefix, endpoint }))
}

/// Removes unfinished files of the store's library, which are named `NAME#N`, and returns their number.
pub(super) fn remove_leftovers(root: &Path, age: Duration) -> std::io::Result<u64> {
    let folders = match std::fs::read_dir(root) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(0),
        folders => folders?,
    };
    let mut n_removed = 0;
    for folder in folders {
        let folder = folder?;
        if !folder.file_type()?.is_dir() {
            continue;
        }
        for file in std::fs::read_dir(folder.path())? {
            let file = file?;
            let name = file.file_name();
            let is_leftover = name
                .to_str()
                .and_then(|name| name.split_once('#'))
                .is_some_and(|(digest, number)| digest.len() == 62 && number.parse::<u32>().is_ok());
            // It may have been completed or removed by now.
            let is_old =
                || Ok::<_, std::io::Error>(file.metadata()?.modified()?.elapsed().is_ok_and(|found| found >= age));
            if is_leftover && is_old().unwrap_or(false) && std::fs::remove_file(file.path()).is_ok() {
                n_removed += 1;
            }
        }
    }
    Ok(n_removed)
}

fn is_loopback(endpoint: &str) -> bool {
    let authority = endpoint.trim_start_matches("http://").split('/').next().unwrap_or_default();
    let host = match authority.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => authority.split(':').next().unwrap_or_default(),
    };
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn wrong(reason: &str) -> Error {
    Error::Config { reason: reason.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_servers_on_this_machine_are_loopback() {
        for (endpoint, expected) in [
            ("http://127.0.0.1:5000", true),
            ("http://localhost", true),
            ("http://[::1]:9000/", true),
            ("http://10.0.0.1:5000", false),
            ("http://localhost.example.org", false),
            ("http://127.0.0.1.example.org", false),
        ] {
            assert_eq!(is_loopback(endpoint), expected, "{endpoint}");
        }
    }
}
