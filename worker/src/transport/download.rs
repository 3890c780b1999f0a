//! Files that come from a site: one stream each, from where an earlier one was cut. A stream takes half the time of SFTP's
//! requests and their answers.

use std::path::Path;

use baton_common::digest::Digest;

use super::landing::Landing;
use super::{Error, Output, SILENCE_LIMIT, Session, quote_path};

/// Fetches one file. See [`Session::get`].
pub(super) async fn get(
    session: &Session,
    from: &str,
    to: &Path,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<Digest, Error> {
    let source = quote_path(from);
    let of_source = |output: &Output| Error::file(from, output.reason().unwrap_or("it could not be read"));
    let said = session.exec(&format!("wc -c < {source}"), b"", SILENCE_LIMIT).await?;
    let size = if said.exit == Some(0) { String::from_utf8_lossy(&said.stdout).trim().parse().ok() } else { None };
    let size = size.ok_or_else(|| of_source(&said))?;
    let mut target = Landing::open(to, size, progress).await?;
    if target.done < size {
        let command = format!("{{ dd bs=1 count=0 skip={} 2> /dev/null; cat; }} < {source}", target.done);
        match session.receive(&command, &mut target).await {
            Ok(output) if output.exit == Some(0) => {}
            Ok(output) => return Err(of_source(&output)),
            Err(error) => return Err(target.fault().await.unwrap_or(error)),
        }
    }
    if target.done < size {
        return Err(Error::file(from, "it has become shorter while it was read"));
    }
    target.finish(to).await
}
