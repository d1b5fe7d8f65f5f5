// A pool of threads for loops whose passes are short and whose results do not depend on who computes what.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include <unistd.h>

class Pool {
public:
    typedef void (*Work)(void* context, int thread, int task);

    // Work through tasks 0..n-1 on up to `threads` threads, this one included.
    void run(int threads, int n, Work work, void* context) {
        std::unique_lock<std::mutex> own(busy_, std::defer_lock);
        if (threads <= 1 || n <= 1 || !own.try_lock()) {
            for (int i = 0; i < n; ++i) work(context, 0, i);
            return;
        }
        grow(threads - 1);
        work_ = work, context_ = context, n_ = n, allowed_ = threads;
        done_.store(0, std::memory_order_relaxed);
        generation_ += 1;
        // generation and number of tasks that are left in one word: a late thread cannot take a task of another loop
        ticket_.store(generation_ << 32 | static_cast<uint32_t>(n), std::memory_order_seq_cst);
        if (sleeping_.load(std::memory_order_seq_cst) > 0) {
            std::lock_guard<std::mutex> lock(sleep_);
            wake_.notify_all();
        }
        help(0);
        for (int spins = 0; done_.load(std::memory_order_acquire) < n; ++spins)
            if (spins > 200) std::this_thread::yield();
    }

    static Pool& instance() {
        // threads do not survive a fork: the child gets a pool of its own, and leaves the parent's memory alone
        static std::atomic<Pool*> pool{nullptr};
        static std::atomic<pid_t> owner{0};
        static std::mutex making;
        pid_t self = getpid();
        if (owner.load(std::memory_order_acquire) != self) {
            std::lock_guard<std::mutex> lock(making);
            if (owner.load(std::memory_order_relaxed) != self) {
                pool.store(new Pool, std::memory_order_relaxed);
                owner.store(self, std::memory_order_release);
            }
        }
        return *pool.load(std::memory_order_relaxed);
    }

private:
    void grow(int workers) {
        while (static_cast<int>(threads_) < workers) {
            int index = static_cast<int>(++threads_);
            std::thread([this, index] { live(index); }).detach();
        }
    }

    // Take tasks until none is left.
    void help(int index) {
        uint64_t ticket = ticket_.load(std::memory_order_acquire);
        while (static_cast<uint32_t>(ticket) != 0) {
            // stored before the ticket: a thread that is left over from a loop with more threads stays out
            if (index >= allowed_.load(std::memory_order_relaxed)) return;
            if (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel)) continue;
            // the loop cannot end before this task is done, so its description is stable
            work_(context_, index, n_ - static_cast<int>(static_cast<uint32_t>(ticket)));
            done_.fetch_add(1, std::memory_order_release);
            ticket = ticket_.load(std::memory_order_acquire);
        }
    }

    void live(int index) {
        while (true) {
            bool found = false;
            for (int spins = 0; spins < 4000 && !found; ++spins) {
                found = waiting(index);
#if defined(__x86_64__)
                if (!found) __builtin_ia32_pause();
#endif
            }
            if (!found) {
                std::unique_lock<std::mutex> lock(sleep_);
                sleeping_.fetch_add(1, std::memory_order_seq_cst);
                wake_.wait_for(lock, std::chrono::seconds(3600), [&] { return waiting(index); });
                sleeping_.fetch_sub(1, std::memory_order_seq_cst);
                continue;
            }
            help(index);
        }
    }

    bool waiting(int index) const {
        return index < allowed_.load(std::memory_order_relaxed) &&
               static_cast<uint32_t>(ticket_.load(std::memory_order_seq_cst)) != 0;
    }

    std::mutex busy_, sleep_;
    std::condition_variable wake_;
    std::atomic<uint64_t> ticket_{0};
    std::atomic<int> done_{0}, sleeping_{0}, allowed_{1};
    uint64_t generation_ = 0;
    size_t threads_ = 0;
    Work work_ = nullptr;
    void* context_ = nullptr;
    int n_ = 0;
};

// for_each(threads, n, f): f(thread, task) for all tasks
template <class F>
static void for_each(int threads, int n, F&& f) {
    Pool::instance().run(
        threads, n,
        [](void* context, int thread, int task) { (*static_cast<std::remove_reference_t<F>*>(context))(thread, task); },
        &f);
}
