//! Moves particles on the accelerator: a type of the app's own, in a `Vec` of the app's own.

use accel_sim::Accelerator;

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Particle {
    position: [f32; 3],
    velocity: [f32; 3],
}

fn advance(accel: &Accelerator, particles: &mut [Particle], dt: f32) -> Result<(), svm::Error> {
    let mut particles = svm::mirror(particles)?;
    accel.run(particles.view_mut(), |chunk| {
        for particle in chunk {
            for (x, v) in particle.position.iter_mut().zip(particle.velocity) {
                *x += dt * v;
            }
        }
    })?;
    particles.close()
}

fn main() -> Result<(), svm::Error> {
    let accel = Accelerator::new()?;
    let particle = Particle {
        position: [1.0; 3],
        velocity: [2.0; 3],
    };
    let mut particles = vec![particle; 50_000];
    advance(&accel, &mut particles, 0.5)?;
    assert!(particles.iter().all(|p| p.position == [2.0; 3]));

    let moved = accel.stats().runtime;
    assert!(moved.to_device_pages() > 0, "it ran in place");
    println!(
        "{} particles, {} pages moved",
        particles.len(),
        moved.to_device_pages()
    );
    Ok(())
}
