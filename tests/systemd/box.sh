#!/bin/bash
# A real systemd over a throw-away copy of this machine's root; it shares the network and touches nothing else.
#
#   box.sh up DIR SOURCE    start it, SOURCE read-only at /source; needs root, overlayfs, util-linux, systemd
#   box.sh in DIR COMMAND…  run a command inside
#   box.sh down DIR         end it, and remove all of it
#
# The root is an overlay whose upper layer is a tmpfs; mounts, processes, hostname, IPC and control groups are
# namespaces of its own. Units that would write to the shared kernel, to clocks or to devices are masked.
set -eu
what=$1 dir=$2
root=$dir/root

up() {
    mkdir -p "$dir"
    mount -t tmpfs -o mode=755 sfwatch-box "$dir"
    mkdir "$dir"/{upper,work,root}
    mount -t overlay -o "lowerdir=/,upperdir=$dir/upper,workdir=$dir/work" overlay "$root"
    mkdir "$root/source"
    : > "$root/etc/machine-id"
    rm -rf "$root"/etc/systemd/system/*.wants "$root/var/log/journal" "$root"/etc/systemd/system/sfwatch*
    for unit in systemd-{sysctl,modules-load,binfmt,random-seed,timesyncd,udevd,udev-trigger,remount-fs}.service \
        systemd-{update-utmp,logind}.service kmod-static-nodes.service modprobe@.service dev-hugepages.mount \
        sys-kernel-{debug,tracing,config}.mount sys-fs-fuse-connections.mount proc-sys-fs-binfmt_misc.{auto,}mount
    do ln -sf /dev/null "$root/etc/systemd/system/$unit"; done
    join_groups
    setsid unshare --fork --pid --mount --uts --ipc --cgroup --kill-child bash "$0" init "$dir" "$1" \
        </dev/null >"$dir/console" 2>&1 &
    outer=$!
    for _ in $(seq 300); do
        sleep 0.1
        [ -d /proc/$outer ] || break
        tr -d ' ' < /proc/$outer/task/$outer/children > "$dir/init"
        state=$("$0" in "$dir" systemctl is-system-running 2>&1) || true
        case $state in running | degraded) return 0 ;; esac
    done
    cat "$dir/console" >&2
    return 1
}

# One control group of ours in each hierarchy: its namespace begins there.
join_groups() {
    for group in /sys/fs/cgroup/ /sys/fs/cgroup/*/; do
        [ -e "$group/cgroup.procs" ] || continue
        mkdir "$group/sfwatch-box-$$" 2>/dev/null || continue
        for set in cpuset.mems cpuset.cpus; do
            [ ! -e "$group/$set" ] || cat "$group/$set" > "$group/sfwatch-box-$$/$set" 2>/dev/null || true
        done
        echo "$group/sfwatch-box-$$" >> "$dir/groups"
        echo $$ > "$group/sfwatch-box-$$/cgroup.procs" || true
    done
}

init() {
    mount --make-rprivate /
    mount --bind "$1" "$root/source"
    mount -o remount,bind,ro "$root/source"
    mount -t proc -o nosuid,nodev,noexec proc "$root/proc"
    mount --bind "$root/proc/sys" "$root/proc/sys"
    mount -o remount,bind,ro "$root/proc/sys"
    mount -t sysfs -o nosuid,nodev,noexec,ro sysfs "$root/sys"
    mount -t tmpfs -o mode=755,nosuid dev "$root/dev"
    for node in null zero full random urandom tty; do
        touch "$root/dev/$node"
        mount --bind "/dev/$node" "$root/dev/$node"
    done
    mkdir "$root/dev/pts" "$root/dev/shm"
    mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts "$root/dev/pts"
    ln -s pts/ptmx "$root/dev/ptmx"
    ln -s /proc/self/fd "$root/dev/fd"
    mount -t tmpfs -o mode=1777 shm "$root/dev/shm"
    mount -t tmpfs -o mode=755 run "$root/run"
    mount -t tmpfs -o mode=1777 tmp "$root/tmp"
    mount_groups "$root/sys/fs/cgroup"
    mkdir "$root/.old"
    cd "$root"
    pivot_root . .old
    umount -l /.old
    rmdir /.old
    mount --make-rshared /
    exec env -i container=box PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 \
        /lib/systemd/systemd --system --unit=basic.target --show-status=no
}

mount_groups() {
    if [ -e /sys/fs/cgroup/cgroup.controllers ]; then
        mount -t cgroup2 cgroup2 "$1"
        return
    fi
    mount -t tmpfs -o mode=755 groups "$1"
    mkdir "$1/unified" "$1/systemd"
    mount -t cgroup2 cgroup2 "$1/unified"
    mount -t cgroup -o none,name=systemd cgroup "$1/systemd"
    for controller in memory pids cpu cpuacct devices freezer blkio; do
        mkdir "$1/$controller"
        mount -t cgroup -o $controller cgroup "$1/$controller" || rmdir "$1/$controller"
    done
}

down() {
    pid=$(cat "$dir/init" || true)
    if [ -n "$pid" ]; then
        kill -s RTMIN+3 "$pid" || true  # halt
        for _ in $(seq 100); do [ -d "/proc/$pid" ] || break; sleep 0.1; done
        ! [ -d "/proc/$pid" ] || kill -9 "$pid"
        for _ in $(seq 50); do [ -d "/proc/$pid" ] || break; sleep 0.1; done
    fi
    while read -r group; do find "$group" -depth -type d -exec rmdir {} \; ; done < "$dir/groups" || true
    umount -R "$root"
    umount -l "$dir"
}

shift 2
case $what in
    up) up "$@" ;;
    init) init "$@" ;;
    in) exec nsenter -t "$(cat "$dir/init")" -m -p -u -i -C -- env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin \
        LANG=C.UTF-8 HOME=/root "$@" ;;
    down) down ;;
esac
