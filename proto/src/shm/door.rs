//! The door to a coordinator's shared memory: a Unix socket in the abstract namespace, so that it has no file either.
//!
//! Who knocks must be on this host and of this user (the system says so), and must know the session's secret, which only the
//! worker was told that joined. It is given the files of the weights, of its lane and of the coordinator's bell.

#[cfg(target_os = "linux")]
pub use linux::{Door, knock};

/// On this system no memory can be given away.
///
/// # Errors
/// Always.
#[cfg(not(target_os = "linux"))]
pub fn knock(_: &str, _: &[u8], _: super::SlotSize, _: Option<super::Capacity>) -> std::io::Result<Opened> {
    Err(std::io::ErrorKind::Unsupported.into())
}

/// What is behind the door: weights, lane and the coordinator's bell, and the rows of sparse tables where there are any.
pub struct Opened {
    pub weights: super::Weights,
    pub lane: super::Lane,
    pub bell: super::memory::BellMemory,
    pub rows: Option<super::Rows>,
}

/// Bytes of the secret.
pub const SECRET: usize = 16;

#[cfg(target_os = "linux")]
mod linux {
    use super::{Opened, SECRET};
    use crate::shm::memory::{BELL_BYTES, BellMemory, Memory};
    use crate::shm::{Capacity, Lane, Rows, SlotSize, Weights};
    use rustix::fd::{BorrowedFd, OwnedFd};
    use rustix::net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    };
    use std::io::{self, IoSlice, IoSliceMut, Read, Write};
    use std::mem::MaybeUninit;
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
    use std::time::Duration;

    /// Neither side waits longer for the other.
    const MOST: Duration = Duration::from_secs(2);

    /// Files that are given, at most.
    const FILES: usize = 4;

    /// The coordinator's side.
    pub struct Door {
        listener: UnixListener,
        name: String,
    }

    impl Door {
        /// A door whose name nobody guesses before it is said.
        ///
        /// # Errors
        /// Where the system makes no socket.
        pub fn open(random: [u8; 8]) -> io::Result<Door> {
            let name = format!("unisono-{:016x}", u64::from_le_bytes(random));
            let listener = UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name)?)?;
            Ok(Door { listener, name })
        }

        /// What a worker is told.
        pub fn name(&self) -> &str {
            &self.name
        }

        /// The listener, to wait for who knocks.
        pub fn listener(&self) -> &UnixListener {
            &self.listener
        }

        /// The secret of who knocked, who must be of this user.
        ///
        /// # Errors
        /// Another user, and who says nothing.
        pub fn ask(stream: &mut UnixStream) -> io::Result<[u8; SECRET]> {
            let (theirs, mine) = (rustix::net::sockopt::socket_peercred(&*stream)?.uid, rustix::process::geteuid());
            if theirs != mine {
                return Err(io::Error::new(io::ErrorKind::PermissionDenied, "a process of another user"));
            }
            stream.set_nonblocking(false)?;
            stream.set_read_timeout(Some(MOST))?;
            stream.set_write_timeout(Some(MOST))?;
            let mut secret = [0; SECRET];
            stream.read_exact(&mut secret)?;
            Ok(secret)
        }

        /// Gives the files.
        ///
        /// # Errors
        /// A memory without a file, and who does not take them.
        pub fn give(stream: &UnixStream, memories: &[&Memory]) -> io::Result<()> {
            let none = || io::Error::other("this memory cannot be shared");
            let files: Vec<BorrowedFd<'_>> =
                memories.iter().map(|memory| memory.file().ok_or_else(none)).collect::<io::Result<_>>()?;
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !control.push(SendAncillaryMessage::ScmRights(&files)) {
                return Err(none());
            }
            rustix::net::sendmsg(stream, &[IoSlice::new(&[1])], &mut control, SendFlags::NOSIGNAL)?;
            Ok(())
        }
    }

    /// The worker's side, for slots of `size`, and where there are sparse tables, rows of a capacity.
    ///
    /// # Errors
    /// Nobody opens (the coordinator is on another host), or what is given does not fit.
    pub fn knock(name: &str, secret: &[u8], size: SlotSize, rows: Option<Capacity>) -> io::Result<Opened> {
        let mut stream = UnixStream::connect_addr(&SocketAddr::from_abstract_name(name)?)?;
        stream.set_read_timeout(Some(MOST))?;
        stream.set_write_timeout(Some(MOST))?;
        stream.write_all(secret)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        rustix::net::recvmsg(&stream, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
        let files: Vec<OwnedFd> = control
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(files) => Some(files),
                _ => None,
            })
            .flatten()
            .collect();
        let mut files = files.into_iter();
        let mut next = || {
            files
                .next()
                .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the coordinator gave no shared memory"))
        };
        let len = size.len;
        Ok(Opened {
            weights: Weights::of(Memory::open(next()?, Weights::bytes(len), false)?, len),
            lane: Lane::of(Memory::open(next()?, Lane::bytes(size), true)?, size),
            bell: BellMemory::of(Memory::open(next()?, BELL_BYTES, true)?),
            rows: match rows {
                Some(capacity) => Some(Rows::of(Memory::open(next()?, capacity.bytes(), false)?, capacity)),
                None => None,
            },
        })
    }

    #[cfg(test)]
    mod tests {
        use super::*;
        use crate::shm::frame::Order;
        use unisono_common::tree::Node;

        #[test]
        fn who_knows_the_secret_gets_the_memory() {
            let door =
                Door::open(std::process::id().to_le_bytes().repeat(2).try_into().expect("8 bytes")).expect("a socket");
            let (size, capacity) = (SlotSize { len: 3, rows: 5, width: 2 }, Capacity { width: 2, state: 0, rows: 10 });
            let (weights, lane) = (Weights::create(3).expect("memory"), Lane::create(size).expect("memory"));
            let rows = crate::shm::RowStore::create(capacity).expect("memory");
            let bell = BellMemory::create().expect("memory");
            let name = door.name().to_string();
            let worker = std::thread::spawn(move || knock(&name, &[7; SECRET], size, Some(capacity)));
            let (mut stream, _) = door.listener().accept().expect("a knock");
            assert_eq!(Door::ask(&mut stream).expect("a secret"), [7; SECRET]);
            let memories = [weights.memory(), lane.memory(), bell.memory(), rows.memory()];
            Door::give(&stream, &memories).expect("it takes them");
            let theirs = worker.join().expect("no panic").expect("memory");
            assert!(theirs.rows.is_some_and(|rows| rows.is_empty()));
            assert_eq!(theirs.weights.of_step(0, 0..3), [0.0; 3]);
            let order = Order {
                step: 5,
                generation: 0,
                node: Node { lo: 0, hi: 1 },
                evaluate: true,
                rows_first: false,
                wakes: true,
            };
            assert!(lane.order(order));
            assert_eq!(theirs.lane.next_order(|| false), Some(order));
            assert!(knock("unisono-nobody", &[7; SECRET], size, None).is_err());
        }
    }
}
