#!/bin/bash
# The first process of a user-mode Linux: an NFS server of a kernel of its own, which exports /mnt, a disk.
# Its other files are this machine's. Runs the command in $COMMAND, and writes its status to $STATUS.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 TMPDIR=/run
mount -t proc proc /proc
mount -t sysfs sysfs /sys
for folder in /run /dev/shm /var/lib/nfs; do mkdir -p $folder; mount -t tmpfs tmpfs $folder; done
mkdir -p /run/lib /var/lib/nfs/v4recovery
ln -s /usr/lib/uml/modules /run/lib/modules
for module in nfsd nfs nfsv3 nfsv4 veth bridge; do modprobe -d /run $module; done
mount --bind /dev/null /etc/resolv.conf
mount -t ext4 /dev/ubda /mnt
ip link set lo up
touch /var/lib/nfs/{etab,rmtab}
mount -t nfsd nfsd /proc/fs/nfsd
echo 15 > /proc/fs/nfsd/nfsv4leasetime
echo 15 > /proc/fs/nfsd/nfsv4gracetime
rpcbind -w
rpc.nfsd 4
mkdir -p /run/root/mnt
mount --bind /mnt /run/root/mnt  # NFS 4 has one root for all exports, and the real one cannot be exported
exportfs -o rw,no_root_squash,no_subtree_check,fsid=0 '*:/run/root'
for folder in /mnt /run/root/mnt; do exportfs -o rw,no_root_squash,no_subtree_check "*:$folder"; done
rpc.mountd -p 20048
cd /mnt
bash -c "$COMMAND"
echo $? > "$STATUS"
umount /mnt 2> /dev/null
halt -f -p
