//! Shared memory for workers of this host: what they are given, and when.

use crate::lock;
use crate::shared::{Shared, Token};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use unisono_proto::shm::{Lane, Memory};

/// An open door, and the lanes of those that went through and have not said so yet.
pub struct Door {
    #[cfg(target_os = "linux")]
    door: unisono_proto::shm::door::Door,
    lanes: Mutex<BTreeMap<Token, Arc<Lane>>>,
}

#[cfg(target_os = "linux")]
impl Door {
    /// Opens a door; `None` where this system has none: then all workers use gRPC.
    pub fn open() -> Option<Door> {
        let mut random = [0; 8];
        getrandom::fill(&mut random).ok()?;
        match unisono_proto::shm::door::Door::open(random) {
            Ok(door) => Some(Door { door, lanes: Mutex::default() }),
            Err(e) => {
                tracing::info!("no shared memory: {e}");
                None
            }
        }
    }

    /// The name that workers are told.
    pub fn name(&self) -> &str {
        self.door.name()
    }

    /// Opens to whoever knocks, until the run is over.
    pub async fn serve(shared: Arc<Shared>) -> std::io::Result<()> {
        let Some(door) = &shared.door else { return std::future::pending().await };
        let listener = door.door.listener().try_clone()?;
        listener.set_nonblocking(true)?;
        let listener = tokio::net::UnixListener::from_std(listener)?;
        loop {
            let (stream, _) = listener.accept().await?;
            let (stream, shared) = (stream.into_std()?, shared.clone());
            tokio::task::spawn_blocking(move || {
                if let Err(e) = shared.door.as_ref().map_or(Ok(()), |door| door.let_in(stream, &shared)) {
                    tracing::debug!("nobody was given shared memory: {e}");
                }
            });
        }
    }

    fn let_in(&self, mut stream: std::os::unix::net::UnixStream, shared: &Shared) -> std::io::Result<()> {
        let secret = unisono_proto::shm::door::Door::ask(&mut stream)?;
        shared.member(&secret).map_err(|_| std::io::Error::other("there is no such session"))?;
        let lane = Arc::new(Lane::create(shared.slots())?);
        // Before it is given: the worker may say so at once.
        lock(&self.lanes).insert(secret, lane.clone());
        let memories = [shared.store.weights().memory(), lane.memory(), shared.inbox.bell.memory()];
        let give = |memories: &[&Memory]| unisono_proto::shm::door::Door::give(&stream, memories);
        let given = match &shared.store.tables {
            Some(tables) => tables.with_memory(|rows| give(&[&memories[..], &[rows]].concat())),
            None => give(&memories),
        };
        if given.is_err() {
            lock(&self.lanes).remove(&secret);
        }
        given
    }
}

#[cfg(not(target_os = "linux"))]
impl Door {
    /// This system has no memory that can be given away.
    pub fn open() -> Option<Door> {
        None
    }

    /// Never asked for.
    pub fn name(&self) -> &str {
        ""
    }

    /// Nobody knocks.
    pub async fn serve(_: Arc<Shared>) -> std::io::Result<()> {
        std::future::pending().await
    }
}

impl Door {
    /// The lane of a session that went through the door.
    pub fn lane(&self, session: &Token) -> Option<Arc<Lane>> {
        lock(&self.lanes).remove(session)
    }
}
