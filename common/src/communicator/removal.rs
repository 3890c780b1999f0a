//! Removes task queues that no program uses any more.

use lapin::options::QueueDeleteOptions;
use tokio::time::timeout;

use super::CheckError;
use super::envelope::{classes, short, task_queue};
use super::link::{ANSWER_LIMIT, close, open, reason};

/// Deletes a task queue with all its classes and messages, on the first broker that answers. A class that does not exist is
/// skipped.
///
/// # Errors
/// See [`CheckError`]. Some of the queues may not be deleted; call this again.
pub async fn remove_task_queues(urls: &[String], queue: &str) -> Result<(), CheckError> {
    let mut errors = Vec::new();
    for url in urls {
        let connection = match open(url, "baton", None).await {
            Ok(connection) => connection,
            Err(error) => {
                errors.push(error);
                continue;
            }
        };
        let deleting = async {
            let channel = connection.create_channel().await?;
            for class in classes(queue) {
                channel.queue_delete(short(&task_queue(&class)), QueueDeleteOptions::default()).await?;
            }
            Ok(())
        };
        let deleted = timeout(ANSWER_LIMIT, deleting).await;
        close(&connection).await;
        let refused = |reason| CheckError::Refused { url: String::new(), reason };
        return match deleted {
            Ok(deleted) => deleted.map_err(|error| refused(reason(&error))),
            Err(_) => Err(refused(format!("no answer within {} s", ANSWER_LIMIT.as_secs()))),
        };
    }
    Err(CheckError::of_all(errors))
}
